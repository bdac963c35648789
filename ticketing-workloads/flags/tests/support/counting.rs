//! An allocator that counts.

#![expect(unsafe_code, reason = "an allocator that counts is one line around the system's")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what each thread allocates.
pub struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static ALL: Cell<usize> = const { Cell::new(0) };
}

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = NOW.try_with(|now| {
            now.set(now.get() + layout.size().cast_signed());
            PEAK.with(|peak| peak.set(peak.get().max(now.get())));
            ALL.with(|all| all.set(all.get() + layout.size()));
        });
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let _ = NOW.try_with(|now| now.set(now.get() - layout.size().cast_signed()));
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What `work` returns, the bytes that it had at most at once, and those that it asked for in all.
pub fn bytes<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    // What another thread has made and this one frees is not counted.
    NOW.set(0);
    PEAK.set(0);
    ALL.set(0);
    let made = work();
    (made, PEAK.get().unsigned_abs(), ALL.get())
}
