#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ticketwave_fuzz::sync_messages(data));
