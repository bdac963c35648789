//! Log lines: one per event, `key=value` or JSON, never a secret.

use crate::args::LogFormat;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("--log-level {level:?} is not a level or filter: {message}")]
pub struct LogLevelError {
    level: String,
    message: String,
}

/// Sends log lines to standard error.
pub fn init(level: &str, format: LogFormat) -> Result<(), LogLevelError> {
    // A bare level is meant for the operator's own lines; the library's spans would repeat each object's name.
    let directives = if level.contains(['=', ',']) { level.to_owned() } else { format!("{level},kube_runtime=warn") };
    let filter = EnvFilter::try_new(directives)
        .map_err(|error| LogLevelError { level: level.to_owned(), message: error.to_string() })?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = fmt::layer().with_writer(std::io::stderr).with_target(false);
    // A second set-up in one process (as in tests) keeps the first.
    let _ = match format {
        LogFormat::Text => {
            registry.with(layer.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).try_init()
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_current_span(true)).try_init(),
    };
    Ok(())
}

/// An id that ties together the log lines of one reconcile over one object; 16 hex digits, as a W3C span id.
pub fn trace_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}
