//! How large a value is in JSON.

use serde::Serialize;
use std::io::{self, Write};

/// How many bytes a value has in JSON; [`usize::MAX`] if it has no spelling there. Nothing is kept of what is counted.
pub fn json_bytes(value: &impl Serialize) -> usize {
    let mut count = Count(0);
    serde_json::to_writer(&mut count, value).map_or(usize::MAX, |()| count.0)
}

struct Count(usize);

impl Write for Count {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.0 += part.len();
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
