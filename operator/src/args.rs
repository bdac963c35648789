//! Command line and environment.

use crate::{
    crash_point::{CrashPoint, Fault},
    flag_sync::args::FlagSyncArgs,
    ofrep::args::OfrepArgs,
};
use clap::{Parser, ValueEnum};
use engine::recovery::Storm;
use std::{net::SocketAddr, time::Duration};

/// Makes ticketing workloads resilient: programs them with ResiliencePolicies and FeatureFlags, watches their health,
/// and recovers them.
#[derive(Clone, Debug, Parser)]
#[command(name = "resilience-operator", version, about, long_about = None)]
pub struct Args {
    /// Namespaces to watch, separated by commas; empty: all of them
    #[arg(long, env = "WATCH_NAMESPACES", value_delimiter = ',', value_name = "NAMES", hide_env_values = true)]
    pub watch_namespaces: Vec<String>,

    /// How pods are reached: straight at their address, or through the API server (works from anywhere, slower)
    #[arg(long, env = "POD_TRANSPORT", value_enum, default_value_t = PodTransport::Direct)]
    pub pod_transport: PodTransport,

    /// Change nothing but the status of policies and flags, which says what would be done
    #[arg(long, env = "DRY_RUN", num_args = 0..=1, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub dry_run: bool,

    /// Tell how the log of a failed cleanup Job ends, in the message of its Recovery; what looks like a secret is masked
    #[arg(long, env = "JOB_LOGS", num_args = 0..=1, default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set)]
    pub job_logs: bool,

    /// So many actions in one namespace within --storm-interval are a storm: nothing more is begun there; 0: never
    #[arg(long, env = "STORM_ACTIONS", default_value_t = 20, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub storm_actions: u16,

    /// See --storm-actions
    #[arg(long, env = "STORM_INTERVAL", default_value = "5m", value_parser = parse_storm)]
    pub storm_interval: Duration,

    /// How long nothing is begun in a namespace after the action that made it a storm
    #[arg(long, env = "STORM_COOLDOWN", default_value = "10m", value_parser = parse_storm)]
    pub storm_cooldown: Duration,

    /// Namespace of the operator itself: its lease and its master key are kept there
    #[arg(long, env = "POD_NAMESPACE", default_value = "resilience-system")]
    pub namespace: String,

    /// Name of this replica among the operator's replicas [default: the host's name]
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,

    /// Address of /livez, /readyz and /metrics
    #[arg(long, env = "LISTEN", default_value = "[::]:8080")]
    pub listen: SocketAddr,

    /// Flags for every OpenFeature SDK
    #[command(flatten)]
    pub ofrep: OfrepArgs,

    /// Flag documents for flagd
    #[command(flatten)]
    pub flag_sync: FlagSyncArgs,

    /// How long a leader that is not heard of keeps the lead; a standby takes over that long after its last sign of life
    #[arg(long, env = "LEASE_DURATION", default_value = "15s", value_parser = parse_lease)]
    pub lease_duration: Duration,

    /// Ends the process where a test wants it to; no release takes it
    #[arg(long, hide = true, value_parser = crate::crash_point::parse)]
    pub crash_at: Option<CrashPoint>,

    /// Fails as a test wants it to; no release takes it
    #[arg(long, hide = true, value_parser = crate::crash_point::parse_fault)]
    pub fault: Option<Fault>,

    /// Asks http and tcp checks at loopback addresses, too, where the pods of a test are; no release takes it
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set, value_parser = crate::crash_point::parse_switch)]
    pub ask_loopback: bool,

    /// Shape of the log lines
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or a filter such as info,operator=debug
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// How pods are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PodTransport {
    /// Straight at the pod's address
    Direct,
    /// Through the API server's pod proxy
    ApiserverProxy,
}

/// Shape of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// key=value, for people
    Text,
    /// One JSON object a line, for machines
    Json,
}

impl Args {
    /// When so much is done in a namespace that nothing more is.
    pub fn storm(&self) -> Storm {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Storm {
            actions: usize::from(self.storm_actions),
            interval_ms: millis(self.storm_interval),
            cooldown_ms: millis(self.storm_cooldown),
        }
    }

    /// Namespaces to watch, without empty names; no namespace: all.
    pub fn namespaces(&self) -> Vec<Option<String>> {
        let named: Vec<_> = self
            .watch_namespaces
            .iter()
            .map(|name| name.trim())
            .filter(|name| !name.is_empty())
            .map(|name| Some(name.to_owned()))
            .collect();
        if named.is_empty() { vec![None] } else { named }
    }
}

fn parse_storm(text: &str) -> Result<Duration, String> {
    text.parse::<crds::Duration<1_000, 86_400_000>>().map(Duration::from).map_err(|error| error.to_string())
}

fn parse_lease(text: &str) -> Result<Duration, String> {
    text.parse::<crds::Duration<2_000, 300_000>>().map(Duration::from).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[rstest::rstest]
    #[case(&["op"], vec![None])]
    #[case(&["op", "--watch-namespaces", ""], vec![None])]
    #[case(&["op", "--watch-namespaces", "a, b"], vec![Some("a".into()), Some("b".into())])]
    fn namespaces(#[case] line: &[&str], #[case] expected: Vec<Option<String>>) {
        assert_eq!(Args::parse_from(line).namespaces(), expected);
    }

    #[rstest::rstest]
    #[case(&["op", "--dry-run"], true)]
    #[case(&["op", "--dry-run=false"], false)]
    #[case(&["op"], false)]
    fn dry_run(#[case] line: &[&str], #[case] expected: bool) {
        assert_eq!(Args::parse_from(line).dry_run, expected);
    }

    #[rstest::rstest]
    #[case(&["op"], false)]
    #[case(&["op", "--ask-loopback"], true)]
    fn nobody_is_asked_on_the_loopback_unless_a_test_says_so(#[case] line: &[&str], #[case] expected: bool) {
        assert_eq!(Args::parse_from(line).ask_loopback, expected);
        assert!(Args::try_parse_from(["op", "--ask-loopback=perhaps"]).is_err());
        assert!(!Args::command().render_long_help().to_string().contains("loopback"));
    }

    #[test]
    fn a_bad_lease_is_refused_with_its_bounds() {
        let error = Args::try_parse_from(["op", "--lease-duration", "1s"]).unwrap_err().to_string();
        assert!(error.contains("between 2s and 5m"), "{error}");
    }
}
