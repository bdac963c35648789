//! What the process uses, under the names that every Prometheus client has for it.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
};

/// Names of the metrics and what they say, in a line.
pub const METRICS: [(&str, &str); 2] = [
    ("process_resident_memory_bytes", "Memory of the process that is in use, in bytes"),
    ("process_open_fds", "Files and connections that the process has open"),
];

/// Reads the figures when they are asked for. One that cannot be read is left out.
#[derive(Debug)]
pub struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        for ((name, help), figure) in METRICS.into_iter().zip([resident_bytes(), open_files()]) {
            if let Some(figure) = figure {
                let gauge = ConstGauge::new(figure);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
            }
        }
        Ok(())
    }
}

fn resident_bytes() -> Option<u64> {
    let pages = resident_pages(&std::fs::read_to_string("/proc/self/statm").ok()?)?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

/// `4021 2310 1200 …`, in pages: all of the memory, and of it what is resident.
fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn open_files() -> Option<u64> {
    u64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::{encoding::text::encode, registry::Registry};

    #[test]
    fn figures_are_those_of_this_process() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessCollector));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let figure = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.parse::<u64>().ok()).unwrap_or_default()
        };
        assert!(figure("process_resident_memory_bytes") > 1 << 20, "{text}");
        assert!(figure("process_open_fds") > 2, "{text}");
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        assert_eq!(resident_pages("4021 2310 1200 1 0 300 0"), Some(2310));
        assert_eq!(resident_pages("4021"), None);
        assert_eq!(resident_pages("4021 many"), None);
    }
}
