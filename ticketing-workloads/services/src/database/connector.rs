//! How connections are opened: where to, how encrypted, and with which password.

use super::error::ConnectCause;
use super::settings::Sessions;
use super::tls::{MakeTls, Tls, TlsStream};
use super::{DatabaseError, DatabaseSettings};
use crate::password_file::PasswordFile;
use arc_swap::ArcSwapOption;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::config::{Host, LoadBalanceHosts, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Connection, Socket};

/// Time that a host has to itself before the next one of the address is tried beside it. One that hangs, or is gone
/// without a word, must not take the time of the whole attempt.
const HEAD_START: Duration = Duration::from_millis(250);

/// The half of a connection that has to be polled for anything to happen.
pub type Driver = Connection<Socket, TlsStream>;
/// Both halves of a connection.
type Opened = (Client, Driver);

/// Opens connections, each with the password that is in force at that moment.
#[derive(Clone)]
pub struct Connector {
    config: Config,
    tls: Tls,
    /// Whose the sessions behind the connections are.
    sessions: Sessions,
    /// Time that the server gives a statement, in milliseconds; absent for connections that are not the pool's.
    statement_ms: Option<Arc<AtomicU64>>,
    password: Option<Arc<PasswordFile>>,
    /// Why the last login was refused, until one succeeds.
    refused: Arc<ArcSwapOption<String>>,
}

impl Connector {
    /// Connects as `config` says; a password in the file stands above its own one.
    pub(super) fn new(config: Config, tls: Tls, sessions: Sessions, password_file: Option<&Path>) -> Self {
        let password = password_file.map(|path| Arc::new(PasswordFile::new(path, "database password")));
        Self { config, tls, sessions, statement_ms: None, password, refused: Arc::default() }
    }

    /// The same for connections of the pool: the server bounds what is done on them, a statement to as many milliseconds
    /// as `statement_ms` says when they are opened.
    pub(super) fn pooled(mut self, statement_ms: Arc<AtomicU64>) -> Self {
        self.statement_ms = Some(statement_ms);
        self
    }

    /// Whose the sessions behind the connections are.
    pub(super) fn sessions(&self) -> Sessions {
        self.sessions
    }

    /// How a request to cancel a statement is encrypted.
    pub(super) async fn tls(&self) -> MakeTls {
        self.tls.connector().await
    }

    /// Whether only a server that takes writes will do.
    pub(super) fn needs_writes(&self) -> bool {
        self.config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite
    }

    /// Why the last login was refused, if none has succeeded since.
    pub(super) fn refusal(&self) -> Option<Arc<String>> {
        self.refused.load_full()
    }

    /// Opens a connection. Nothing comes over it unless its other half is polled.
    pub async fn open(&self) -> Result<Opened, tokio_postgres::Error> {
        let mut config = self.config.clone();
        if let Some(file) = &self.password
            && let Some(password) = file.read().await
        {
            config.password(password);
        }
        // A pooler refuses them, and would give the session with them to somebody else.
        if let Some(statement_ms) = self.statement_ms.as_ref().filter(|_| self.sessions == Sessions::Own) {
            config = DatabaseSettings::bounded(config, statement_ms.load(Ordering::Acquire));
        }
        let opened = first_of(&config, &self.tls).await;
        match &opened {
            Ok(_) if self.refused.load().is_none() => {}
            Ok(_) => {
                self.refused.store(None);
                tracing::info!("the database lets this service in again");
            }
            Err(error) if ConnectCause::of(error).is_refusal() => {
                let said = Arc::new(self.explain_connect(error));
                // Once, not for each of the many connections that are refused.
                if self.refused.swap(Some(Arc::clone(&said))).as_ref() != Some(&said) {
                    tracing::error!("no connection to the database: {said}");
                }
            }
            Err(_) => {}
        }
        opened
    }

    /// An error for the person on call: of a refused password also where it comes from.
    pub(super) fn explain(&self, error: &DatabaseError) -> String {
        match error {
            DatabaseError::Connect(error) => self.explain_connect(error),
            other => other.to_string(),
        }
    }

    fn explain_connect(&self, error: &tokio_postgres::Error) -> String {
        let cause = ConnectCause::of(error);
        let said = cause.in_words(error);
        if !cause.needs_other_password() {
            return said;
        }
        match &self.password {
            Some(file) => format!("{said}; {}", file.in_words()),
            None => format!("{said}; it is not in a file (DATABASE_PASSWORD_FILE), so a new one takes a restart"),
        }
    }
}

/// Connects to the first host that will do, in the order of the address.
async fn first_of(config: &Config, tls: &Tls) -> Result<Opened, tokio_postgres::Error> {
    let make_tls = tls.connector().await;
    let hosts = one_by_one(config);
    let mut waiting = hosts.iter();
    let mut trying = FuturesUnordered::new();
    let mut failed: Option<tokio_postgres::Error> = None;
    loop {
        match (waiting.next(), failed.take()) {
            (None, Some(error)) if trying.is_empty() => return Err(error),
            (next, error) => {
                trying.extend(next.map(|config| connect(config, tls, &make_tls)));
                failed = error;
            }
        }
        let answer = if waiting.len() > 0 {
            tokio::time::timeout(HEAD_START, trying.next()).await
        } else {
            Ok(trying.next().await)
        };
        match answer {
            Ok(Some(Ok(opened))) => return Ok(opened),
            // What says the most about why there is no connection: a replica beside a host that is gone.
            Ok(Some(Err(error))) => {
                let said = |error: &tokio_postgres::Error| ConnectCause::of(error) != ConnectCause::Other;
                failed = Some(failed.take().filter(|before| said(before) || !said(&error)).unwrap_or(error));
            }
            Ok(None) | Err(_) => {}
        }
    }
}

/// Connects to one host, encrypted as `sslmode` has it.
async fn connect(config: &Config, tls: &Tls, make_tls: &MakeTls) -> Result<Opened, tokio_postgres::Error> {
    let in_mode = |mode: SslMode| {
        let mut config = config.clone();
        config.ssl_mode(mode_for(&config, mode));
        let make_tls = make_tls.clone();
        async move { config.connect(make_tls).await }
    };
    match tls.attempts() {
        (first, Some(other)) => match in_mode(first).await {
            Err(error) if is_refused_for_encryption(&error) => match in_mode(other).await {
                // What was wrong at first says more than that the other way is not open either.
                Err(second) if is_refused_for_encryption(&second) => Err(error),
                outcome => outcome,
            },
            outcome => outcome,
        },
        (only, None) => in_mode(only).await,
    }
}

/// The mode for the host of `config`: nobody listens in on a socket of this machine. With an address beside it, the
/// connection goes there and not to the socket.
fn mode_for(config: &Config, mode: SslMode) -> SslMode {
    let is_local = !config.get_hosts().is_empty()
        && config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)))
        && config.get_hostaddrs().is_empty();
    if is_local { SslMode::Disable } else { mode }
}

/// Whether the server has refused a connection for how it was, or was not, encrypted. libpq tries the other way after any
/// refusal; here a wrong password, or a server that is full, is not asked twice.
fn is_refused_for_encryption(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(state) => *state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        // The driver does not tell kinds of errors apart other than in its words.
        None => error.to_string().starts_with("error performing TLS handshake"),
    }
}

/// The same once for each of its hosts, in the order in which they are tried. Each of them has its own kind of way: one may
/// be a socket of this machine, and another one far away.
fn one_by_one(config: &Config) -> Vec<Config> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    let is_whole = [hosts.len(), addresses.len()].iter().all(|length| [0, count].contains(length))
        && (ports.len() <= 1 || ports.len() == count);
    // What does not fit together is for the driver to refuse.
    if count == 0 || !is_whole {
        return vec![config.clone()];
    }
    let of_host = |index: usize| {
        let mut one = without_hosts(config);
        match hosts.get(index) {
            Some(Host::Tcp(name)) => _ = one.host(name),
            Some(Host::Unix(path)) => _ = one.host_path(path),
            // The name with which a certificate is compared.
            None => _ = addresses.get(index).map(|address| one.host(address.to_string())),
        }
        if let Some(address) = addresses.get(index) {
            one.hostaddr(*address);
        }
        if let Some(port) = ports.get(index).or(ports.first()) {
            one.port(*port);
        }
        one
    };
    let mut order: Vec<_> = (0..count).collect();
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        let random = RandomState::new();
        order.sort_by_cached_key(|index| random.hash_one(index));
    }
    order.into_iter().map(of_host).collect()
}

/// A copy of everything but hosts and ports, which the driver can only add to.
fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(name) = config.get_dbname() {
        copy.dbname(name);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

impl deadpool_postgres::Connect for Connector {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), tokio_postgres::Error>> + Send + '_>> {
        Box::pin(async move {
            let (client, connection) = self.open().await?;
            let driver = tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::warn!(error = %DatabaseError::Statement(error), "a database connection broke");
                }
            });
            Ok((client, driver))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_gets_everything_that_the_address_says() {
        let parameters = "connect_timeout=4&tcp_user_timeout=5&keepalives=0&keepalives_idle=6&keepalives_interval=7\
                          &keepalives_retries=8&target_session_attrs=read-only&channel_binding=disable\
                          &sslmode=disable&sslnegotiation=direct&options=-c%20geqo%3Doff&application_name=me";
        let read = |hosts: &str| format!("postgres://me:secret@{hosts}/x?{parameters}").parse::<Config>().unwrap();
        let both = one_by_one(&read("one,two:5433"));
        assert_eq!(both, [read("one:5432"), read("two:5433")]);
        let unix = one_by_one(&read("%2Fvar%2Frun,two"));
        assert_eq!(unix, [read("%2Fvar%2Frun:5432"), read("two:5432")]);
        let addresses: Config = "hostaddr=127.0.0.1,127.0.0.2 port=1".parse().unwrap();
        let each = ["127.0.0.1", "127.0.0.2"]
            .map(|one| format!("host={one} hostaddr={one} port=1").parse::<Config>().unwrap());
        assert_eq!(one_by_one(&addresses), each);
    }

    /// One of them in the list, and the way to all of them was not encrypted.
    #[test]
    fn a_socket_of_this_machine_among_the_hosts_leaves_the_others_encrypted() {
        for address in ["host=/run,two load_balance_hosts=random", "host=/run,two"] {
            let hosts = one_by_one(&address.parse().unwrap());
            let modes: Vec<_> =
                hosts.iter().map(|one| (one.get_hosts().to_vec(), mode_for(one, SslMode::Require))).collect();
            assert_eq!(modes.len(), 2);
            assert!(modes.contains(&(vec![Host::Tcp("two".to_owned())], SslMode::Require)), "{modes:?}");
            assert!(modes.contains(&(vec![Host::Unix("/run".into())], SslMode::Disable)), "{modes:?}");
        }
        for elsewhere in ["host=/run,two,three port=1,2", "host=/run hostaddr=10.0.0.1"] {
            let hosts = one_by_one(&elsewhere.parse().unwrap());
            assert!(hosts.iter().all(|one| mode_for(one, SslMode::Require) == SslMode::Require), "{elsewhere}");
        }
    }

    #[test]
    fn hosts_are_tried_in_any_order_where_the_address_says_so() {
        let config: Config = "host=a,b,c,d,e,f,g,h load_balance_hosts=random".parse().unwrap();
        let firsts: std::collections::BTreeSet<_> =
            (0..100).map(|_| format!("{:?}", one_by_one(&config)[0].get_hosts())).collect();
        assert!(firsts.len() > 1);
    }

    #[rstest::rstest]
    #[case::none("user=me")]
    #[case::that_do_not_fit("host=one,two hostaddr=127.0.0.1")]
    #[case::ports_that_do_not_fit("host=one,two,three port=1,2")]
    fn what_is_not_a_list_in_order_is_left_to_the_driver(#[case] address: &str) {
        let config: Config = address.parse().unwrap();
        assert_eq!(one_by_one(&config), [config]);
    }
}
