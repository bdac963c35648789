//! One line per event on standard output.

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `key=value`, for people.
    #[default]
    Text,
    /// One JSON object per line, for machines.
    Json,
}

/// Starts logging; `RUST_LOG` chooses what is written (`info` unless set, the database's driver less).
pub fn init(format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,tokio_postgres=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    // A second start in one process, as tests do, keeps the first.
    drop(match format {
        Format::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stdout())).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    });
}
