//! Where the database is, and how to log in.

use super::Connector;
use super::tls::Tls;
use crate::host::StartError;
use contract::{BulkheadSettings, DependencySettings, RetryOn, RetrySettings, TimeoutSettings};
use std::path::Path;
use std::time::Duration;
use tokio_postgres::Config;
use tokio_postgres::config::TargetSessionAttrs;

/// Bounds that the server itself keeps, for statements that nobody waits for any more. The wait for a lock is shorter
/// than a health check: a connection that waits for a row must not look like one that hangs.
const SERVER_BOUNDS: &str = "-c lock_timeout=500ms -c idle_in_transaction_session_timeout=10s";

/// Time that the server gives a statement beyond that of an attempt (`perTry`), in milliseconds: nobody waits for it any
/// more, and by then it should have been cancelled. Until its end it may keep others from the rows that it has locked.
const BEYOND_ATTEMPT_MS: u64 = 1_000;

/// Longest time for which what was sent may stay without an acknowledgement of the other machine. Together with the
/// keep-alives below it ends a connection whose other end is gone, also one that nobody waits on.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);
/// Time without traffic after which a connection is tried.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
/// Time between two such tries.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Tries without an answer after which the connection is over.
const KEEPALIVE_RETRIES: u32 = 3;
type Change = fn(&mut Config);

/// Parameters that an address may set otherwise.
const PARAMETERS: [(&str, Change); 5] = [
    ("tcp_user_timeout", |config| _ = config.tcp_user_timeout(UNACKNOWLEDGED)),
    ("keepalives_idle", |config| _ = config.keepalives_idle(KEEPALIVE_IDLE)),
    ("keepalives_interval", |config| _ = config.keepalives_interval(KEEPALIVE_INTERVAL)),
    ("keepalives_retries", |config| _ = config.keepalives_retries(KEEPALIVE_RETRIES)),
    // Behind a failover, the old server may still answer, as a replica.
    ("target_session_attrs", |config| _ = config.target_session_attrs(TargetSessionAttrs::ReadWrite)),
];

/// Whose the sessions behind the connections are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sessions {
    /// Each connection has one of its own, as with the server itself, or with PgBouncer in session mode.
    #[default]
    #[value(name = "session")]
    Own,
    /// Each transaction may get another one: PgBouncer in transaction mode. Nothing is kept in a session.
    #[value(name = "transaction")]
    Shared,
}

/// Settings of the database.
#[derive(Clone, Debug, clap::Args)]
pub struct DatabaseSettings {
    /// Whole address, `postgres://user:password@host:5432/database`; stands above the single parts. May name several
    /// hosts, `host-1:5432,host-2:5432`, and parameters after a `?`.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Host of the database.
    #[arg(long, env = "PGHOST", default_value = "localhost")]
    pub pghost: String,
    /// Port of the database.
    #[arg(long, env = "PGPORT", default_value_t = 5432)]
    pub pgport: u16,
    /// Role to log in as.
    #[arg(long, env = "PGUSER", default_value = "postgres")]
    pub pguser: String,
    /// Password of the role; needs no escaping, unlike one inside `DATABASE_URL`.
    #[arg(long, env = "PGPASSWORD", hide_env_values = true)]
    pub pgpassword: Option<String>,
    /// File with the password of the role and nothing else, such as a mounted Secret; stands above any other password. It is
    /// read again for each new connection, so that a password that was rotated needs no restart.
    #[arg(long, env = "DATABASE_PASSWORD_FILE")]
    pub database_password_file: Option<String>,
    /// Name of the database.
    #[arg(long, env = "PGDATABASE", default_value = "postgres")]
    pub pgdatabase: String,
    /// How the way to the server is encrypted, as libpq has it: disable, allow, prefer, require, verify-ca or verify-full;
    /// `sslmode` in `DATABASE_URL` stands above it [default: prefer]
    #[arg(long, env = "PGSSLMODE")]
    pub pgsslmode: Option<String>,
    /// File with the root certificates that vouch for the server (PEM), or `system`; read again for each new connection.
    /// `sslrootcert` in `DATABASE_URL` stands above it.
    #[arg(long, env = "PGSSLROOTCERT")]
    pub pgsslrootcert: Option<String>,
    /// What the connections lead to: `session` for the server itself or a pooler that keeps sessions apart, `transaction`
    /// for PgBouncer in transaction mode.
    #[arg(long, env = "DATABASE_POOLER", value_enum, default_value_t)]
    pub database_pooler: Sessions,
    /// Address of the server itself for migrations, past a pooler and with a role that may change the schema; by default they
    /// go the way that everything else goes. A password in it stands above all others.
    #[arg(long, env = "DATABASE_MIGRATION_URL", hide_env_values = true)]
    pub database_migration_url: Option<String>,
    /// Most connections in the pool.
    #[arg(long, env = "DATABASE_POOL_SIZE", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub database_pool_size: u16,
}

/// Name of the bulkhead of database calls that have no other one.
pub const BULKHEAD: &str = "database";

/// That bulkhead for a pool of `size` connections: more calls at once would only spend their attempt's time waiting for a
/// connection.
pub fn bulkhead(size: u16) -> (String, BulkheadSettings) {
    let settings = BulkheadSettings { max_concurrent: u32::from(size), max_queued: 500, max_wait_ms: 2_000 };
    (BULKHEAD.to_owned(), settings)
}

/// How a database is called without a policy: the ADR's numbers. Retries go after 200, 400 and 800 ms.
pub fn defaults() -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings { request_ms: 5_000, per_try_ms: 1_000, connect_ms: None },
        retry: RetrySettings {
            base_interval_ms: 200,
            max_interval_ms: 2_000,
            // Who lost against each other must not meet again at the same moment.
            jitter_percent: 50,
            retry_on: [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::Deadlock, RetryOn::VersionConflict].into(),
            ..Default::default()
        },
        bulkhead: Some(BULKHEAD.to_owned()),
        ..Default::default()
    }
}

impl DatabaseSettings {
    /// How migrations connect, under the same name.
    pub fn migration_connector(&self, application: &str) -> Result<Connector, StartError> {
        let Some(url) = self.database_migration_url.as_ref().filter(|url| !url.is_empty()) else {
            return self.connector(application);
        };
        let mut direct = Self { database_url: Some(url.clone()), database_pooler: Sessions::Own, ..self.clone() };
        let parsed = without(url, ["sslmode", "sslrootcert"], &mut [None, None]).parse::<Config>();
        if parsed.is_ok_and(|config| config.get_password().is_some()) {
            direct.database_password_file = None;
        }
        direct.connector(application)
    }

    /// How to connect. `application` is how the connections call themselves in `pg_stat_activity`.
    pub fn connector(&self, application: &str) -> Result<Connector, StartError> {
        let file = self.database_password_file.as_ref().filter(|file| !file.is_empty());
        let url = self.database_url.as_ref().filter(|url| !url.is_empty());
        // The driver knows fewer modes than libpq, and no root certificates.
        let mut found = [None, None];
        let url = url.map(|url| without(url, ["sslmode", "sslrootcert"], &mut found));
        let [mode, roots] = found;
        // One that is empty says nothing.
        let [mode, roots] = [mode, roots].map(|value| value.filter(|value| !value.is_empty()));
        let tls = Tls::new(
            mode.or_else(|| self.pgsslmode.clone()).as_deref(),
            roots.or_else(|| self.pgsslrootcert.clone()).as_deref(),
        )?;
        let config = self.config(url.as_deref(), application)?;
        Ok(Connector::new(config, tls, self.database_pooler, file.map(Path::new)))
    }

    fn config(&self, url: Option<&str>, application: &str) -> Result<Config, StartError> {
        let mut config = if let Some(url) = url {
            // The parser's own words are not shown: they may hold a password.
            url.parse::<Config>().map_err(|_| {
                let message = "DATABASE_URL is not of the form postgres://user:password@host:5432/database";
                StartError::Setting(message.into())
            })?
        } else {
            let mut config = Config::new();
            config.host(&self.pghost).port(self.pgport).user(&self.pguser).dbname(&self.pgdatabase);
            config
        };
        // Beside an address without one, too: inside an address, a password would have to be escaped.
        if let Some(password) = self.pgpassword.as_ref().filter(|_| config.get_password().is_none()) {
            config.password(password);
        }
        let is_set = |name| url.is_some_and(|url| sets(url, name));
        for (_, change) in PARAMETERS.iter().filter(|(name, _)| !is_set(name)) {
            change(&mut config);
        }
        config.application_name(application);
        Ok(config)
    }

    /// How the connections of the pool are opened, where their sessions are their own.
    pub(super) fn bounded(mut config: Config, statement_ms: u64) -> Config {
        let options = config.get_options().map_or_else(String::new, |options| format!("{options} "));
        config.options(format!("{options}{SERVER_BOUNDS} -c statement_timeout={statement_ms}"));
        config
    }
}

/// Time that the server gives a statement of an attempt that has `per_try_ms`.
pub(super) fn statement_ms(per_try_ms: u64) -> u64 {
    per_try_ms.saturating_add(BEYOND_ATTEMPT_MS)
}

/// An address without these parameters, of which the values go into `found`.
fn without(address: &str, names: [&str; 2], found: &mut [Option<String>; 2]) -> String {
    let mut is_other = |pair: &str, decode: fn(&str) -> String| {
        let Some((name, value)) = pair.split_once('=') else { return true };
        let Some(place) = names.iter().position(|one| *one == name.trim()) else { return true };
        found[place] = Some(decode(value));
        false
    };
    if is_url(address) {
        let Some((before, parameters)) = split_url(address) else { return address.to_owned() };
        let decode = |value: &str| {
            // A plus is a plus here.
            let pair = format!("v={}", value.replace('+', "%2B"));
            form_urlencoded::parse(pair.as_bytes()).map(|(_, value)| value.into_owned()).next().unwrap_or_default()
        };
        let others: Vec<_> = parameters.split('&').filter(|pair| is_other(pair, decode)).collect();
        // The driver takes everything before the first such sign for user and password.
        let others = others.join("&").replace('@', "%40");
        if others.is_empty() { before.to_owned() } else { format!("{before}?{others}") }
    } else {
        pairs(address).into_iter().filter(|pair| is_other(pair, unquoted)).collect::<Vec<_>>().join(" ")
    }
}

/// The parts `name=value` of an address, each as it is written there: a value in quotes may hold spaces, and behind a
/// backslash any character.
fn pairs(address: &str) -> Vec<&str> {
    let (mut found, mut from, mut quoted, mut escaped) = (Vec::new(), None, false, false);
    // There may be spaces on both sides of the first equals sign.
    let mut has_value = false;
    let mut has_sign = false;
    for (at, character) in address.char_indices() {
        if escaped {
            escaped = false;
            continue;
        }
        match character {
            '\\' => escaped = true,
            '\'' => quoted = !quoted,
            '=' if !quoted && from.is_some() && !has_sign => {
                has_sign = true;
                continue;
            }
            _ => {}
        }
        if character.is_whitespace() && !quoted {
            if has_value && let Some(start) = from.take() {
                found.push(&address[start..at]);
                (has_value, has_sign) = (false, false);
            }
            continue;
        }
        has_value |= has_sign;
        from.get_or_insert(at);
    }
    found.extend(from.map(|start| address[start..].trim_end()));
    found
}

/// A value as it is written, without its quotes and backslashes.
fn unquoted(value: &str) -> String {
    let mut characters = value.trim().chars();
    let mut text = String::new();
    while let Some(character) = characters.next() {
        match character {
            '\\' => text.extend(characters.next()),
            '\'' => {}
            other => text.push(other),
        }
    }
    text
}

fn is_url(address: &str) -> bool {
    address.starts_with("postgres://") || address.starts_with("postgresql://")
}

/// A URL before and behind the question mark. A password may hold one, too, and a parameter a sign like the one behind the
/// password: that one is before the path.
fn split_url(address: &str) -> Option<(&str, &str)> {
    let authority = address.find("://")? + 3;
    let rest = address.get(authority..)?;
    let is_parameter = |at: &usize| rest[..*at].find('/').is_some_and(|path| rest[path..*at].contains('?'));
    let user_ends = rest.find('@').filter(|at| !is_parameter(at)).map_or(0, |at| at + 1);
    let mark = authority + user_ends + rest.get(user_ends..)?.find('?')?;
    Some((&address[..mark], &address[mark + 1..]))
}

/// Whether an address sets this parameter: `postgres://…?name=value`, or `name=value` between spaces.
fn sets(address: &str, name: &str) -> bool {
    let is_it = |pair: &str| pair.split_once('=').is_some_and(|(key, _)| key.trim() == name);
    if is_url(address) {
        split_url(address).is_some_and(|(_, parameters)| parameters.split('&').any(is_it))
    } else {
        pairs(address).into_iter().any(is_it)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: Option<&str>) -> DatabaseSettings {
        DatabaseSettings {
            database_url: url.map(String::from),
            pghost: "db".into(),
            pgport: 5432,
            pguser: "booking".into(),
            pgpassword: Some("from parts".into()),
            database_password_file: None,
            pgsslmode: None,
            pgsslrootcert: None,
            database_pooler: Sessions::Own,
            database_migration_url: None,
            pgdatabase: "tickets".into(),
            database_pool_size: 8,
        }
    }

    #[test]
    fn takes_an_address_or_its_parts() {
        let parts = settings(None).config(None, "pod-1").unwrap();
        assert_eq!((parts.get_user(), parts.get_dbname()), (Some("booking"), Some("tickets")));
        let whole = settings(None).config(Some("postgres://me:secret@elsewhere:1/other"), "pod-1").unwrap();
        assert_eq!((whole.get_user(), whole.get_dbname()), (Some("me"), Some("other")));
        assert_eq!((whole.get_application_name(), whole.get_password()), (Some("pod-1"), Some(&b"secret"[..])));
        let without = settings(None).config(Some("postgres://me@elsewhere/other"), "pod-1").unwrap();
        assert_eq!(without.get_password(), Some(&b"from parts"[..]));
    }

    #[rstest::rstest]
    #[case::malformed("postgres://me:secret@host:not-a-port/x")]
    #[case::tls("postgres://me:secret@host/x?sslmode=verify-full")]
    fn says_what_is_wrong_without_the_password(#[case] url: &str) {
        let error = settings(Some(url)).connector("pod-1").err().unwrap().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn an_empty_mode_in_an_address_leaves_the_settings_alone() {
        let mut settings = settings(Some("postgres://me@host/x?sslmode="));
        settings.pgsslmode = Some("verify-full".to_owned());
        let error = settings.connector("pod-1").err().unwrap().to_string();
        assert!(error.contains("need root certificates"), "{error}");
    }

    /// A password with spaces is not another one.
    #[test]
    fn what_an_address_has_in_quotes_reaches_the_driver() {
        let mut found = [None, None];
        let address = without("host=h user=me password='a  b' sslmode=require", ["sslmode", "sslrootcert"], &mut found);
        let config = settings(None).config(Some(&address), "pod-1").unwrap();
        assert_eq!(config.get_password(), Some(&b"a  b"[..]));
    }

    #[test]
    fn connections_that_lead_nowhere_end_and_replicas_are_passed_over() {
        for url in [None, Some("postgres://me:a?keepalives_idle=9@host/x"), Some("host=host user=me")] {
            let config = settings(None).config(url, "pod-1").unwrap();
            assert!(config.get_keepalives());
            assert_eq!(config.get_keepalives_idle(), Duration::from_secs(5));
            assert_eq!(config.get_keepalives_interval(), Some(Duration::from_secs(2)));
            assert_eq!(config.get_keepalives_retries(), Some(3));
            assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(10)));
            assert_eq!(config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
        }
    }

    #[rstest::rstest]
    #[case::url("postgres://me@host/x?keepalives_idle=60&tcp_user_timeout=0&target_session_attrs=any")]
    #[case::pairs("host=host user=me keepalives_idle=60 tcp_user_timeout=0 target_session_attrs=any")]
    fn an_address_may_say_otherwise(#[case] url: &str) {
        let config = settings(None).config(Some(url), "pod-1").unwrap();
        assert_eq!(config.get_keepalives_idle(), Duration::from_secs(60));
        assert_eq!(config.get_tcp_user_timeout(), None, "the machine's own");
        assert_eq!(config.get_target_session_attrs(), TargetSessionAttrs::Any);
        assert_eq!(config.get_keepalives_retries(), Some(3), "what it does not say stays");
    }

    #[test]
    fn keeps_options_of_the_address() {
        let config = settings(None).config(Some("postgres://me@host/x?options=-c%20geqo%3Doff"), "pod-1").unwrap();
        let options = DatabaseSettings::bounded(config, 2_000).get_options().unwrap().to_owned();
        assert!(options.starts_with("-c geqo=off -c lock_timeout"), "{options}");
        assert!(options.ends_with("-c statement_timeout=2000"), "{options}");
    }

    #[rstest::rstest]
    #[case::url(
        "postgres://me:a?b@host/x?sslmode=verify-full&connect_timeout=4&sslrootcert=%2Fca%20s%2Broot.crt",
        "postgres://me:a?b@host/x?connect_timeout=4",
        [Some("verify-full"), Some("/ca s+root.crt")]
    )]
    #[case::alone("postgres://host/x?sslmode=require", "postgres://host/x", [Some("require"), None])]
    #[case::none("postgres://host/x?connect_timeout=4", "postgres://host/x?connect_timeout=4", [None, None])]
    #[case::pairs("host=host sslmode='require' user=me", "host=host user=me", [Some("require"), None])]
    #[case::quoted("password='a  b sslmode=x\\' ' sslrootcert = '/my ca.crt' host=h", "password='a  b sslmode=x\\' ' host=h",
        [None, Some("/my ca.crt")])]
    #[case::at_sign("postgres://host/x?sslmode=require&application_name=a@b", "postgres://host/x?application_name=a%40b",
        [Some("require"), None])]
    #[case::both("postgres://me:a?b@host/x?sslmode=require&application_name=a@b",
        "postgres://me:a?b@host/x?application_name=a%40b", [Some("require"), None])]
    #[case::empty("postgres://host/x?sslmode=", "postgres://host/x", [Some(""), None])]
    fn takes_what_the_driver_does_not_know_out_of_an_address(
        #[case] address: &str,
        #[case] rest: &str,
        #[case] expected: [Option<&str>; 2],
    ) {
        let mut found = [None, None];
        assert_eq!(without(address, ["sslmode", "sslrootcert"], &mut found), rest);
        assert_eq!(found.each_ref().map(Option::as_deref), expected);
    }
}
