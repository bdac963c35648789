//! The `http` and `tcp` checks of a policy, as the operator asks them.

use super::{Invalid, count, invalid};
use crds::{
    ResiliencePolicySpec,
    resilience_policy::{self as api, CheckScope},
};
use engine::check::Thresholds;
use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

/// Longest time of one ask, whatever the policy says: an ask holds a place that others wait for.
const LONGEST_ASK: Duration = Duration::from_secs(30);
/// Status codes of a healthy answer where the policy names none.
const HEALTHY_STATUSES: RangeInclusive<u16> = 200..=399;

/// A check that the operator asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckSettings {
    /// Whether each pod has an answer of its own, or most of them decide.
    pub scope: CheckScope,
    /// Name of the Service whose pods are asked, in the policy's namespace.
    pub service: String,
    /// Port of the Service.
    pub port: u16,
    /// What is asked.
    pub probe: Probe,
    /// Time between two runs.
    pub interval: Duration,
    /// Time of one ask, at most 30 s.
    pub timeout: Duration,
    /// Runs in a row that change the evaluation.
    pub thresholds: Thresholds,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// For a connection.
    Tcp,
    /// For an answer over HTTP.
    Http {
        /// The path, with its query.
        path: String,
        /// Status codes of a healthy answer.
        expected: Vec<RangeInclusive<u16>>,
        /// How TLS is spoken; absent: it is not.
        tls: Option<Tls>,
    },
}

impl Probe {
    /// Label for metrics: `http` or `tcp`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http { .. } => "http",
        }
    }
}

/// How TLS is spoken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Name of the ConfigMap with the certificates to verify against; absent: any certificate is taken.
    pub ca: Option<String>,
    /// Name that the certificate must be for; absent: that of the Service.
    pub server_name: Option<String>,
}

/// The checks that the operator asks, by their names.
pub fn asked(spec: &ResiliencePolicySpec) -> Result<BTreeMap<String, CheckSettings>, Invalid> {
    let mut all = BTreeMap::new();
    for (index, check) in spec.health_checks.iter().enumerate() {
        if let Some(settings) = check_settings(check, &format!("spec.healthChecks[{index}]"))? {
            all.insert(check.name.clone(), settings);
        }
    }
    Ok(all)
}

fn check_settings(check: &api::HealthCheck, path: &str) -> Result<Option<CheckSettings>, Invalid> {
    let (service, port, probe) = match (&check.http, &check.tcp) {
        (Some(_), Some(_)) => return Err(invalid(path, "at most one of http, tcp and memory may be set")),
        (Some(http), None) => (&http.service, http.port, self::http(http, &format!("{path}.http"))?),
        (None, Some(tcp)) => (&tcp.service, tcp.port, Probe::Tcp),
        (None, None) => return Ok(None),
    };
    let kind = probe.label();
    let port = u16::try_from(port).map_err(|_| invalid(format!("{path}.{kind}.port"), "must be 1 to 65535"))?;
    Ok(Some(CheckSettings {
        scope: check.scope,
        service: service.clone(),
        port,
        probe,
        interval: Duration::from_millis(check.interval.millis()),
        timeout: Duration::from_millis(check.timeout.millis()).min(LONGEST_ASK),
        thresholds: Thresholds { unhealthy: count(check.unhealthy_threshold), healthy: count(check.healthy_threshold) },
    }))
}

fn http(http: &api::HttpProbe, at: &str) -> Result<Probe, Invalid> {
    // Taken apart as a whole, so that a new member cannot be forgotten.
    let api::HttpProbe { service: _, port: _, path, scheme, expected_statuses, tls } = http;
    if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(invalid(format!("{at}.path"), "must start with a slash and be printable ASCII without spaces"));
    }
    let tls = match (scheme, tls) {
        (api::ProbeScheme::Http, None) => None,
        (api::ProbeScheme::Http, Some(_)) => {
            return Err(invalid(format!("{at}.scheme"), "must be HTTPS where tls is set"));
        }
        (api::ProbeScheme::Https, tls) => Some(self::tls(tls.as_ref(), at)?),
    };
    let status = |code: i32| u16::try_from(code).unwrap_or(0);
    let range = |range: &api::StatusRange| status(range.start)..=status(range.end.unwrap_or(range.start));
    let expected = expected_statuses.as_ref().map(|ranges| ranges.iter().map(range).collect());
    Ok(Probe::Http { path: path.clone(), expected: expected.unwrap_or_else(|| vec![HEALTHY_STATUSES]), tls })
}

fn tls(tls: Option<&api::ProbeTls>, at: &str) -> Result<Tls, Invalid> {
    let api::ProbeTls { ca_config_map_ref, server_name, insecure_skip_verify } = tls.cloned().unwrap_or_default();
    let ca = ca_config_map_ref.map(|reference| reference.name);
    match (&ca, insecure_skip_verify) {
        (Some(_), true) => {
            Err(invalid(format!("{at}.tls.insecureSkipVerify"), "must not be true beside caConfigMapRef"))
        }
        (None, false) => Err(invalid(
            format!("{at}.tls"),
            "HTTPS needs caConfigMapRef, a ConfigMap whose ca.crt the certificate is verified against, or insecureSkipVerify: true",
        )),
        _ => Ok(Tls { ca, server_name }),
    }
}

/// Sentences about checks that are less safe than they look.
pub fn warnings(spec: &ResiliencePolicySpec) -> Vec<String> {
    let unverified = |check: &&api::HealthCheck| {
        check.http.iter().filter_map(|http| http.tls.as_ref()).any(|tls| tls.insecure_skip_verify)
    };
    let warning = |check: &api::HealthCheck| {
        let service = check.http.as_ref().map_or("", |http| http.service.as_str());
        format!(
            "{}: insecureSkipVerify: the certificate of Service {service} is not verified, so anybody who gets into the way can answer for its pods; name a caConfigMapRef instead",
            check.name
        )
    };
    spec.health_checks.iter().filter(unverified).map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(check: &str) -> ResiliencePolicySpec {
        serde_saphyr::from_str(&format!("targetRefs: [{{name: w}}]\nhealthChecks: [{{name: site, {check}}}]")).unwrap()
    }

    fn probe(check: &str) -> Probe {
        asked(&spec(check)).unwrap().remove("site").unwrap().probe
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let settings = asked(&spec("http: {service: web, port: 80}")).unwrap().remove("site").unwrap();
        assert_eq!((settings.scope, settings.service.as_str(), settings.port), (CheckScope::Pod, "web", 80));
        assert_eq!((settings.interval, settings.timeout), (Duration::from_secs(5), Duration::from_secs(1)));
        assert_eq!(settings.thresholds, Thresholds { unhealthy: 3, healthy: 1 });
        assert_eq!(settings.probe, Probe::Http { path: "/".to_owned(), expected: vec![200..=399], tls: None });
        assert_eq!(probe("tcp: {service: web, port: 80}"), Probe::Tcp);
        assert!(asked(&spec("memory: {}")).unwrap().is_empty() && asked(&spec("")).unwrap().is_empty());
    }

    #[test]
    fn status_codes_are_ranges() {
        let check = "http: {service: web, port: 80, expectedStatuses: [{start: 200, end: 204}, {start: 404}]}";
        let Probe::Http { expected, .. } = probe(check) else { panic!() };
        assert_eq!(expected, [200..=204, 404..=404]);
    }

    #[test]
    fn an_ask_never_takes_longer_than_half_a_minute() {
        let settings = asked(&spec("tcp: {service: web, port: 80}, timeout: 5m, interval: 1h")).unwrap();
        assert_eq!(settings["site"].timeout, LONGEST_ASK);
    }

    #[rstest::rstest]
    #[case("tls: {caConfigMapRef: {name: ca}, serverName: web.example}", Some("ca"), Some("web.example"))]
    #[case("tls: {insecureSkipVerify: true}", None, None)]
    fn tls_is_verified_unless_said_otherwise(
        #[case] tls: &str,
        #[case] ca: Option<&str>,
        #[case] server_name: Option<&str>,
    ) {
        let spec = spec(&format!("http: {{service: web, port: 443, scheme: HTTPS, {tls}}}"));
        let Probe::Http { tls: Some(tls), .. } = asked(&spec).unwrap().remove("site").unwrap().probe else { panic!() };
        assert_eq!((tls.ca.as_deref(), tls.server_name.as_deref()), (ca, server_name));
        let warned = warnings(&spec).concat();
        assert_eq!(warned.contains("the certificate of Service web is not verified"), ca.is_none(), "{warned}");
    }

    #[rstest::rstest]
    #[case(
        "http: {service: web, port: 80}, tcp: {service: web, port: 80}",
        "spec.healthChecks[0]: at most one of http, tcp and memory may be set"
    )]
    #[case("tcp: {service: web, port: 70000}", "spec.healthChecks[0].tcp.port: must be 1 to 65535")]
    #[case(
        "http: {service: web, port: 80, tls: {}}",
        "spec.healthChecks[0].http.scheme: must be HTTPS where tls is set"
    )]
    #[case(
        "http: {service: web, port: 80, scheme: HTTPS}",
        "spec.healthChecks[0].http.tls: HTTPS needs caConfigMapRef, a ConfigMap whose ca.crt the certificate is verified against, or insecureSkipVerify: true"
    )]
    #[case(
        "http: {service: web, port: 80, scheme: HTTPS, tls: {caConfigMapRef: {name: ca}, insecureSkipVerify: true}}",
        "spec.healthChecks[0].http.tls.insecureSkipVerify: must not be true beside caConfigMapRef"
    )]
    #[case(
        "http: {service: web, port: 80, path: \"/ HTTP/1.1\\r\\nHost: other\"}",
        "spec.healthChecks[0].http.path: must start with a slash and be printable ASCII without spaces"
    )]
    fn what_admission_would_refuse_is_refused(#[case] check: &str, #[case] expected: &str) {
        assert_eq!(asked(&spec(check)).unwrap_err().to_string(), expected);
    }
}
