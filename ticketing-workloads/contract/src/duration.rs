//! Durations as people write them in a manifest.

/// The shortest way to write `millis`, such as `1m30s` or `500ms`; 0 is `0s`.
pub fn spell(mut millis: u64) -> String {
    let mut text = String::new();
    for (unit, size) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if millis >= size {
            text = format!("{text}{}{unit}", millis / size);
            millis %= size;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}
