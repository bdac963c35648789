//! Conversations with the mail server: how one is begun, and that it is kept for the mails that follow.

use super::access::Login;
use super::mail::MailError;
use super::refusal::{Phase, Reply, plain};
use crate::mail_address::{ascii_domain, redacted};
use lettre::transport::smtp::Error as SmtpError;
use lettre::transport::smtp::authentication::DEFAULT_MECHANISMS;
use lettre::transport::smtp::client::{AsyncSmtpConnection, TlsParameters};
use lettre::transport::smtp::commands::Rset;
use lettre::transport::smtp::extension::ClientId;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// How long the end of a conversation may take, and the reset between two mails.
const GOODBYE: Duration = Duration::from_secs(1);
/// Mails of one conversation. Some servers take no more than a hundred, and behind one name there may be several of them.
const MAILS: u32 = 100;
/// Servers end a conversation in which nothing is said, some of them soon: one that was silent for this long is ended here.
const IDLE: Duration = Duration::from_secs(5);

/// How the way to the mail server is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Encryption {
    /// Not at all: for a server in the same network.
    #[default]
    None,
    /// By STARTTLS, which the server must have.
    Starttls,
    /// From the first byte on.
    Tls,
}

/// How to begin a conversation.
pub struct Server {
    pub host: String,
    pub port: u16,
    pub encryption: Encryption,
    pub tls: TlsParameters,
    pub login: Option<Login>,
    /// What this service calls itself; `None`: the address that it has towards the server.
    pub hello: Option<ClientId>,
    /// The address to begin with, of those that the host has.
    first: AtomicUsize,
}

/// A name for EHLO, from a setting: a domain with a dot, or an address in brackets. Empty is none.
pub fn hello(text: &str) -> Result<Option<ClientId>, String> {
    let literal = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let wrong = || {
        format!(
            "MAIL_HELO_NAME {text:?} is none that mail servers take: give a name with a dot, such as tickets.example.com, or \
             an address in brackets, such as [192.0.2.1] or [IPv6:2001:db8::1], or leave it empty for the pod's own address"
        )
    };
    match literal {
        _ if text.is_empty() => Ok(None),
        Some(literal) => match literal.strip_prefix("IPv6:") {
            Some(address) => address.parse().map(ClientId::Ipv6).map(Some).map_err(|_| wrong()),
            None => literal.parse().map(ClientId::Ipv4).map(Some).map_err(|_| wrong()),
        },
        None => ascii_domain(text).map(ClientId::Domain).map(Some).map_err(|_| wrong()),
    }
}

impl Server {
    pub fn new(host: String, port: u16, encryption: Encryption, tls: TlsParameters) -> Self {
        Self { host, port, encryption, tls, login: None, hello: None, first: AtomicUsize::new(0) }
    }

    /// Begins a conversation, as far as the login. Each address of the host has `timeout` to take the connection.
    async fn open(&self, timeout: Duration) -> Result<AsyncSmtpConnection, MailError> {
        let unknown = |error: std::io::Error| MailError::NotSent(format!("{}: {error}", self.host));
        let addresses: Vec<_> =
            tokio::net::lookup_host((self.host.as_str(), self.port)).await.map_err(unknown)?.collect();
        let (mut session, hello) = self.connect(&addresses, timeout).await?;
        if self.encryption == Encryption::Starttls {
            let secured = session.starttls(self.tls.clone(), &hello).await;
            secured.map_err(|error| not_sent(&error, Phase::StartTls))?;
        }
        if let Some(login) = &self.login {
            let known = session.auth(DEFAULT_MECHANISMS, &login.credentials().await?).await;
            known.map_err(|error| not_sent(&error, Phase::Login))?;
        }
        Ok(session)
    }

    /// Tries one address after the other, beginning with the one that worked last: neither one that swallows packets nor one
    /// that refuses this service keeps the others from being asked.
    async fn connect(
        &self,
        addresses: &[SocketAddr],
        timeout: Duration,
    ) -> Result<(AsyncSmtpConnection, ClientId), MailError> {
        let mut last = MailError::NotSent(format!("{} has no address", self.host));
        let begin = self.first.load(Ordering::Relaxed);
        for nth in (0..addresses.len()).map(|nth| begin.wrapping_add(nth)) {
            let Some(address) = addresses.get(nth % addresses.len()) else { continue };
            // One that takes the connection and says nothing uses up the whole attempt: then the next attempt begins behind it.
            self.first.store(nth.wrapping_add(1), Ordering::Relaxed);
            let hello = self.hello_to(Some(*address)).await;
            let wrapped = (self.encryption == Encryption::Tls).then(|| self.tls.clone());
            match AsyncSmtpConnection::connect_tokio1(*address, Some(timeout), &hello, wrapped, None).await {
                Ok(session) => {
                    self.first.store(nth, Ordering::Relaxed);
                    return Ok((session, hello));
                }
                Err(error) => {
                    tracing::debug!(%address, %error, "this address of the mail server did not work");
                    last = not_sent(&error, Phase::Connect);
                }
            }
        }
        Err(last)
    }

    /// RFC 5321 §4.1.4: who has no name of its own gives its address. A pod's name has no dot, and is known nowhere.
    async fn hello_to(&self, server: Option<SocketAddr>) -> ClientId {
        if let Some(hello) = &self.hello {
            return hello.clone();
        }
        let local = async {
            let any: IpAddr = match server? {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            // Sends nothing: it only asks for the way.
            let socket = UdpSocket::bind((any, 0)).await.ok()?;
            socket.connect(server?).await.ok()?;
            Some(socket.local_addr().ok()?.ip().to_canonical())
        };
        match local.await {
            Some(IpAddr::V4(address)) => ClientId::Ipv4(address),
            Some(IpAddr::V6(address)) => ClientId::Ipv6(address),
            None => ClientId::default(),
        }
    }
}

/// What went wrong in words, without addresses.
pub fn in_words(error: &SmtpError) -> String {
    redacted(&plain(&error.to_string()))
}

/// What the server said, if it said anything.
pub fn reply(error: &SmtpError, phase: Phase) -> Option<Reply> {
    let text = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    error.status().map(|code| Reply::new(phase, u16::from(code), &text))
}

/// A failure before the text has left.
pub fn not_sent(error: &SmtpError, phase: Phase) -> MailError {
    match reply(error, phase) {
        Some(reply) => reply.into(),
        None => MailError::NotSent(format!("at {phase}: {}", in_words(error))),
    }
}

/// A conversation between two mails.
pub struct Session {
    pub connection: AsyncSmtpConnection,
    mails: u32,
    since: Instant,
    /// Its place among those that there may be; given up when the connection is closed.
    place: OwnedSemaphorePermit,
}

impl Session {
    /// Whether a mail went through it already: it may have been ended by the server since.
    pub fn was_used(&self) -> bool {
        self.mails > 0
    }

    /// Ends it. How that goes matters to nobody: nobody waits for it. Its place is free when it is over.
    pub fn end(self) {
        let Self { mut connection, place, .. } = self;
        tokio::spawn(async move {
            let _ = tokio::time::timeout(GOODBYE, connection.quit()).await;
            drop(connection);
            drop(place);
        });
    }
}

/// Conversations that are kept, and how many there may be.
pub struct Sessions {
    pub server: Server,
    kept: Arc<Kept>,
    places: Arc<Semaphore>,
}

#[derive(Default)]
struct Kept {
    idle: Mutex<Vec<Session>>,
    /// One more is idle.
    changed: Notify,
}

impl Sessions {
    /// At most `most` at once, those that are being ended included.
    pub fn new(server: Server, most: usize) -> Self {
        Self { server, kept: Arc::default(), places: Arc::new(Semaphore::new(most)) }
    }

    /// One that is kept, or a new one.
    pub async fn take(&self, timeout: Duration) -> Result<Session, MailError> {
        self.end_idle();
        loop {
            let changed = self.kept.changed.notified();
            let kept = self.kept.lock().pop();
            if let Some(session) = kept {
                return Ok(session);
            }
            // One that is being reset or ended takes a moment.
            tokio::select! {
                place = self.place() => return self.open(place?, timeout).await,
                () = changed => {}
            }
        }
    }

    /// A new one.
    pub async fn begin(&self, timeout: Duration) -> Result<Session, MailError> {
        let kept = self.kept.lock().pop();
        // Not beside one that nobody uses.
        let place = match kept {
            Some(session) => session.place,
            None => self.place().await?,
        };
        self.open(place, timeout).await
    }

    /// A new one in the place of another, which is closed before.
    pub async fn begin_instead(&self, session: Session, timeout: Duration) -> Result<Session, MailError> {
        let Session { connection, place, .. } = session;
        drop(connection);
        self.open(place, timeout).await
    }

    async fn place(&self) -> Result<OwnedSemaphorePermit, MailError> {
        let place = Arc::clone(&self.places).acquire_owned().await;
        place.map_err(|error| MailError::NotSent(error.to_string()))
    }

    async fn open(&self, place: OwnedSemaphorePermit, timeout: Duration) -> Result<Session, MailError> {
        // Large, because of TLS, and rarely needed.
        let connection = Box::pin(self.server.open(timeout)).await?;
        Ok(Session { connection, mails: 0, since: Instant::now(), place })
    }

    /// Keeps it for the next mail; the last one is over.
    pub fn keep(&self, session: Session) {
        self.kept.keep(session);
    }

    /// The same after a mail that is not over: it is taken back first.
    pub fn reset_and_keep(&self, mut session: Session) {
        let kept = Arc::clone(&self.kept);
        tokio::spawn(async move {
            if let Ok(Ok(_)) = tokio::time::timeout(GOODBYE, session.connection.command(Rset)).await {
                kept.keep(session);
            }
        });
    }

    /// Ends those that nobody needed for a while.
    pub fn end_idle(&self) {
        let mut idle = self.kept.lock();
        let (kept, over) = std::mem::take(&mut *idle).into_iter().partition(|session| session.since.elapsed() < IDLE);
        *idle = kept;
        drop(idle);
        let over: Vec<Session> = over;
        over.into_iter().for_each(Session::end);
    }
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Vec<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, mut session: Session) {
        session.mails += 1;
        session.since = Instant::now();
        if session.mails < MAILS && !session.connection.has_broken() {
            self.lock().push(session);
            self.changed.notify_one();
        } else {
            session.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mail_sink::{MailSink, Settings};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpSocket, TcpStream};

    fn server() -> Server {
        let tls = TlsParameters::new("localhost".to_owned()).unwrap();
        Server::new("localhost".to_owned(), 25, Encryption::None, tls)
    }

    #[rstest::rstest]
    #[case("", None)]
    #[case("tickets.example.com", Some("tickets.example.com"))]
    #[case("Tickets.münchen.example", Some("tickets.xn--mnchen-3ya.example"))]
    #[case("[192.0.2.1]", Some("[192.0.2.1]"))]
    #[case("[IPv6:2001:db8::1]", Some("[IPv6:2001:db8::1]"))]
    fn names_that_servers_take(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(hello(text).unwrap().map(|name| name.to_string()).as_deref(), expected);
    }

    #[rstest::rstest]
    #[case("notification-5d8f7c-x2x4b")]
    #[case("localhost")]
    #[case("192.0.2.1")]
    #[case("[2001:db8::1]")]
    #[case("a b.example.com")]
    #[case("example.com.")]
    fn names_that_servers_refuse(#[case] text: &str) {
        assert!(hello(text).unwrap_err().contains("give a name with a dot"));
    }

    #[tokio::test]
    async fn without_a_name_it_gives_its_address() {
        let to = |address: &str| Some(address.parse().unwrap());
        assert_eq!(server().hello_to(to("127.0.0.1:25")).await.to_string(), "[127.0.0.1]");
        assert_eq!(server().hello_to(to("[::1]:25")).await.to_string(), "[IPv6:::1]");
    }

    /// An address whose queue of connections is full: it answers nothing, as one behind a firewall.
    async fn silent() -> (SocketAddr, Vec<TcpStream>, tokio::net::TcpListener) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut filling = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
            filling.push(stream);
        }
        (address, filling, listener)
    }

    /// A server that takes its time for a reset, and for a goodbye even more.
    async fn slow_server() -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let seen = Arc::clone(&most);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (open, seen) = (Arc::clone(&open), Arc::clone(&seen));
                seen.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let mut lines = BufReader::new(read).lines();
                    let _ = write.write_all(b"220 ready\r\n").await;
                    let mut is_open = true;
                    while let Ok(Some(line)) = lines.next_line().await {
                        let wait = match line.get(..4) {
                            Some("RSET") => 200,
                            Some("QUIT") => 400,
                            _ => 0,
                        };
                        tokio::time::sleep(Duration::from_millis(wait)).await;
                        // Its client knows of the end with this answer.
                        if line.starts_with("QUIT") && std::mem::take(&mut is_open) {
                            open.fetch_sub(1, Ordering::SeqCst);
                        }
                        if write.write_all(b"250 ok\r\n").await.is_err() {
                            break;
                        }
                    }
                    open.fetch_sub(usize::from(is_open), Ordering::SeqCst);
                });
            }
        });
        (address, most)
    }

    #[tokio::test]
    async fn there_are_never_more_conversations_than_there_may_be() {
        let (address, most) = slow_server().await;
        let tls = TlsParameters::new("localhost".to_owned()).unwrap();
        let server = Server::new("127.0.0.1".to_owned(), address.port(), Encryption::None, tls);
        let sessions = Sessions::new(server, 1);
        let second = Duration::from_secs(1);
        let session = sessions.take(second).await.unwrap();
        sessions.reset_and_keep(session);
        let session = sessions.take(second).await.unwrap();
        assert!(session.was_used(), "it is waited for");
        session.end();
        let session = sessions.take(second).await.unwrap();
        assert!(!session.was_used());
        assert_eq!(most.load(Ordering::SeqCst), 1, "the one before is over");
        sessions.keep(session);
        let session = sessions.begin(second).await.unwrap();
        assert!(!session.was_used());
        sessions.begin_instead(session, second).await.unwrap();
        // The server sees that one was closed without a goodbye a little after its client.
        assert!(most.load(Ordering::SeqCst) <= 2, "{most:?}");
    }

    #[tokio::test]
    async fn each_address_has_its_own_time_and_the_one_that_works_is_kept() {
        let (silent, _filling, _listener) = silent().await;
        let refuses = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let settings = Settings { bind_address: Some([127, 0, 0, 1].into()), port: 0, smtp_port: 0 };
        let sink = MailSink::start(&settings).unwrap();
        let [_, works] = sink.addresses().unwrap();
        tokio::spawn(sink.run(std::future::pending()));
        let server = server();
        let addresses = [silent, refuses, works];
        let begin = Instant::now();
        let first = server.connect(&addresses, Duration::from_millis(300)).await;
        let took = begin.elapsed();
        assert!(first.is_ok() && took >= Duration::from_millis(300) && took < Duration::from_secs(5), "{took:?}");
        assert_eq!(server.first.load(Ordering::Relaxed) % 3, 2, "the next one begins with it");
        let error = server.connect(&addresses[..2], Duration::from_millis(100)).await.err().unwrap();
        assert!(matches!(error, MailError::NotSent(_)), "{error}");
    }
}
