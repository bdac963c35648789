//! `ticketing health`: how the service in this container is, in words and as an exit code. The image has nothing else to
//! ask with.

use contract::{CheckStatus, HealthReport, admin::REPORT_PATH};
use http_body_util::{BodyExt, Limited};
use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

/// Largest report that is read, in bytes.
const MAX_REPORT_BYTES: usize = 1024 * 1024;

/// Which service to ask.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// Address that the service listens on [default: that of this machine itself]
    #[arg(long, env = "BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// Its admin port.
    #[arg(long, env = "ADMIN_PORT", default_value_t = contract::admin::DEFAULT_PORT)]
    pub admin_port: u16,
    /// How long it may take to answer, in seconds.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub timeout: u64,
}

/// Why a service is not taken to be well.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Nobody answers, or not in time.
    #[error("the service does not answer at {url}: {why}. Is it running, and on this port (ADMIN_PORT)?")]
    NoAnswer {
        /// Where it was asked.
        url: String,
        /// What went wrong.
        why: String,
    },
    /// Something else listens there.
    #[error("what answers at {url} is no service of ours: {why}")]
    NoReport {
        /// Where it was asked.
        url: String,
        /// What was wrong with the answer.
        why: String,
    },
    /// It says itself that it is not.
    #[error("unhealthy: {0}")]
    Unhealthy(String),
}

/// Asks the service, and prints what it says of itself. An error if it is unhealthy or says nothing.
pub async fn run(settings: &Settings) -> Result<(), HealthError> {
    let address = SocketAddr::new(reachable(settings.bind_address), settings.admin_port);
    let report = ask(&format!("http://{address}{REPORT_PATH}"), Duration::from_secs(settings.timeout)).await?;
    print!("{}", in_words(&report));
    evaluate(&report)
}

/// Who listens on all addresses is asked on its own.
fn reachable(bound: Option<IpAddr>) -> IpAddr {
    match bound {
        None => Ipv4Addr::LOCALHOST.into(),
        Some(IpAddr::V4(address)) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        Some(IpAddr::V6(address)) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        Some(address) => address,
    }
}

async fn ask(url: &str, timeout: Duration) -> Result<HealthReport, HealthError> {
    let no_answer = |why: String| HealthError::NoAnswer { url: url.to_owned(), why };
    let no_report = |why: String| HealthError::NoReport { url: url.to_owned(), why };
    let whole = async {
        let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build();
        let client = client.map_err(|error| no_answer(error.to_string()))?;
        let answer = client.get(url).send().await;
        let answer = answer.map_err(|error| no_answer(crate::http_client::in_full(&error)))?;
        if !answer.status().is_success() {
            return Err(no_report(format!("status {}", answer.status())));
        }
        let body = Limited::new(reqwest::Body::from(answer), MAX_REPORT_BYTES).collect().await;
        let body = body.map_err(|error| no_report(error.to_string()))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| no_report(error.to_string()))
    };
    let late = || no_answer(format!("nothing within {} s", timeout.as_secs()));
    tokio::time::timeout(timeout, whole).await.unwrap_or_else(|_| Err(late()))
}

/// A line for each check: its name, its status, what was found.
fn in_words(report: &HealthReport) -> String {
    let width = report.checks.keys().map(String::len).max().unwrap_or_default();
    let mut text = String::new();
    for (name, check) in &report.checks {
        let line = format!("{name:<width$}  {:<9}  {}", word(check.status), check.message);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn word(status: CheckStatus) -> &'static str {
    match status {
        CheckStatus::Healthy => "Healthy",
        CheckStatus::Degraded => "Degraded",
        CheckStatus::Unhealthy => "Unhealthy",
        CheckStatus::Unknown => "Unknown",
    }
}

fn evaluate(report: &HealthReport) -> Result<(), HealthError> {
    if report.status != CheckStatus::Unhealthy {
        return Ok(());
    }
    let failing = report.checks.iter().filter(|(_, check)| check.status == CheckStatus::Unhealthy);
    let names: Vec<_> = failing.map(|(name, _)| name.as_str()).collect();
    Err(HealthError::Unhealthy(names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Router, routing::get};
    use contract::CheckReport;
    use rstest::rstest;

    fn report(checks: &[(&str, CheckStatus, &str)]) -> HealthReport {
        let check = |(name, status, message): &(&str, CheckStatus, &str)| {
            let report: CheckReport =
                serde_json::from_value(serde_json::json!({ "status": status, "message": message })).unwrap();
            ((*name).to_owned(), report)
        };
        let status = checks.iter().map(|(_, status, _)| *status).max().unwrap_or_default();
        HealthReport {
            status,
            checks: checks.iter().map(check).collect(),
            ..serde_json::from_str(r#"{"status":"Healthy","pod":"p"}"#).unwrap()
        }
    }

    #[test]
    fn it_is_said_in_a_line_for_each_check() {
        let report = report(&[("db", CheckStatus::Unhealthy, "no answer"), ("memory", CheckStatus::Healthy, "")]);
        assert_eq!(in_words(&report), "db      Unhealthy  no answer\nmemory  Healthy\n");
        assert_eq!(evaluate(&report).unwrap_err().to_string(), "unhealthy: db");
    }

    #[rstest]
    #[case(CheckStatus::Healthy)]
    #[case(CheckStatus::Degraded)]
    fn only_what_is_unhealthy_fails(#[case] status: CheckStatus) {
        assert!(evaluate(&report(&[("db", status, "")])).is_ok());
    }

    #[rstest]
    #[case(None, "127.0.0.1")]
    #[case(Some("0.0.0.0"), "127.0.0.1")]
    #[case(Some("::"), "::1")]
    #[case(Some("10.0.0.7"), "10.0.0.7")]
    fn it_is_asked_where_it_listens(#[case] bound: Option<&str>, #[case] asked: &str) {
        assert_eq!(reachable(bound.map(|address| address.parse().unwrap())).to_string(), asked);
    }

    /// Serves `router`; the answer is its address.
    async fn serving(router: Router) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    #[tokio::test]
    async fn one_that_says_nothing_useful_is_not_taken_to_be_well() {
        let text = |body: &'static str| Router::new().route(REPORT_PATH, get(move || async move { body }));
        let silent = Router::new().route(REPORT_PATH, get(std::future::pending::<&str>));
        let large = Router::new().route(REPORT_PATH, get(|| async { "x".repeat(MAX_REPORT_BYTES + 1) }));
        for (router, words) in [
            (text("hello"), "is no service of ours: expected value"),
            (Router::new(), "is no service of ours: status 404"),
            (large, "is no service of ours: length limit exceeded"),
            (silent, "does not answer"),
        ] {
            let url = format!("http://{}{REPORT_PATH}", serving(router).await);
            let error = ask(&url, Duration::from_millis(500)).await.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let url = format!("http://{}{REPORT_PATH}", serving(text(r#"{"status":"Degraded","pod":"p"}"#)).await);
        assert_eq!(ask(&url, Duration::from_secs(5)).await.unwrap().status, CheckStatus::Degraded);
    }
}
