//! One line per event on standard output.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The database's driver. It logs the values of statements, which are addresses of buyers and more, to whom asks for `debug`.
const DRIVER: &str = "tokio_postgres";

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `key=value`, for people.
    #[default]
    Text,
    /// One JSON object per line, for machines.
    Json,
}

/// Starts logging; `RUST_LOG` chooses what is written (`info` unless set). Of the database's driver it is warnings and errors,
/// whatever is asked for.
pub fn init(format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    // Not a directive among the others: a more specific one would stand above it.
    let without_values = filter_fn(|event| may_be_written(event.target(), *event.level()));
    // A second start in one process, as tests do, keeps the first.
    drop(match format {
        Format::Text => {
            let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
            builder.with_ansi(is_terminal).finish().with(without_values).try_init()
        }
        Format::Json => builder.json().flatten_event(true).finish().with(without_values).try_init(),
    });
}

/// Whether it has no values of statements.
fn may_be_written(target: &str, level: tracing::Level) -> bool {
    let is_of_driver = target.strip_prefix(DRIVER).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    !is_of_driver || level <= LevelFilter::WARN
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[rstest::rstest]
    #[case("tokio_postgres", Level::WARN, true)]
    #[case("tokio_postgres::query", Level::ERROR, true)]
    #[case("tokio_postgres", Level::INFO, false)]
    #[case("tokio_postgres::query", Level::DEBUG, false)]
    #[case("tokio_postgres::prepare", Level::TRACE, false)]
    #[case("tokio_postgres_other", Level::DEBUG, true)]
    #[case("ticketing_services::booking", Level::TRACE, true)]
    fn the_driver_shows_no_values(#[case] target: &str, #[case] level: Level, #[case] expected: bool) {
        assert_eq!(may_be_written(target, level), expected);
    }
}
