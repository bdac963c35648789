//! A mail server that delivers nothing: it keeps what it gets, and refuses what it is told to.
//!
//! `GET /mails` shows what it got, `GET /stats` how much and over how many conversations, `PUT /behaviour` says how it behaves
//! from now on (`{}`: well).

use crate::answers::problem;
use crate::host::StartError;
use crate::mail_address::redacted_address;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use resilience::server::{Limits, listen, serve};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes of mails that are kept; the oldest go.
const MAX_KEPT_BYTES: usize = 32 * 1024 * 1024;
/// Conversations at once.
const MAX_CONVERSATIONS: usize = 256;
/// Largest mail, in bytes.
const MAX_MAIL_BYTES: usize = 10 * 1024 * 1024;
/// Longest line of a conversation, in bytes.
const MAX_LINE_BYTES: u64 = 4 * 1024;
/// Longest silence of a client.
const SILENCE: Duration = Duration::from_secs(60);

/// Settings of the mail sink.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// Address to listen on [default: all addresses of the machine, IPv6 and IPv4]
    #[arg(long, env = "BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// Port of the admin interface; 0 takes any free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Port for SMTP; 0 takes any free one.
    #[arg(long, env = "SMTP_PORT", default_value_t = 1025)]
    pub smtp_port: u16,
}

/// How it behaves. Without a body it behaves well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a thing to ask for on its own")]
pub struct Behaviour {
    /// Connections are closed at once.
    pub down: bool,
    /// Nothing is answered.
    pub hang: bool,
    /// The sender is refused (550).
    pub refuse_sender: bool,
    /// QUIT is never answered.
    pub hang_at_end: bool,
    /// Every mail is to be sent later (451).
    pub try_later: bool,
    /// Mails are taken at once, and said to be after so many milliseconds.
    pub delay_ms: u64,
    /// RSET is answered after so many milliseconds.
    pub reset_delay_ms: u64,
    /// Mails are taken, and the connection closed without an answer.
    pub take_then_close: bool,
    /// Mails to addresses that contain this are refused for ever (550).
    pub refuse: Option<String>,
    /// Mails to addresses that contain this are to be sent later (451).
    pub greylist: Option<String>,
    /// Recipients whose address contains this get no answer.
    pub hang_recipient: Option<String>,
    /// Only mails to addresses that contain this are delayed by `delayMs`.
    pub slow: Option<String>,
    /// A client that names itself without a dot or an address literal is refused (504).
    pub needs_dotted_helo: bool,
    /// SMTPUTF8 is not offered.
    pub no_smtp_utf8: bool,
    /// Mails are taken from this user only.
    pub login: Option<Login>,
    /// What is answered instead of a yes; the first that fits.
    pub replies: Vec<Reply>,
}

/// Who may send mails.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    pub user: String,
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

impl Login {
    /// Whether this is what `AUTH PLAIN` says.
    fn is(&self, plain: &str) -> bool {
        let said = BASE64_STANDARD.decode(plain).unwrap_or_default();
        said == format!("\0{}\0{}", self.user, self.password).as_bytes()
    }
}

/// An answer of the test's own, such as that of a real server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reply {
    /// What it answers.
    pub at: Phase,
    /// Code and text, such as `554 5.7.1 Relay access denied`. Separate lines of one answer by a line feed.
    pub reply: String,
    /// Only for addresses that contain this; from `rcpt` on.
    pub to: Option<String>,
}

/// A step of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// The greeting.
    Connect,
    Helo,
    Mail,
    Rcpt,
    Data,
    /// The dot behind the text.
    End,
}

impl Behaviour {
    /// The answer that is asked for at this step, whose command or recipients are `of`.
    fn reply(&self, at: Phase, of: &str) -> Option<String> {
        let fits = |reply: &&Reply| reply.at == at && reply.to.as_ref().is_none_or(|to| of.contains(to.as_str()));
        let text = &self.replies.iter().find(fits)?.reply;
        let lines: Vec<_> = text.lines().collect();
        let (code, _) = text.split_once(' ')?;
        let last = lines.len().saturating_sub(1);
        let line = |(nth, line): (usize, &&str)| match nth {
            0 if last == 0 => (*line).to_owned(),
            0 => line.replacen(' ', "-", 1),
            _ => format!("{code}{}{line}", if nth == last { ' ' } else { '-' }),
        };
        Some(lines.iter().enumerate().map(line).collect::<Vec<_>>().join("\r\n"))
    }

    /// How long a mail to these takes.
    fn delay(&self, to: &str) -> Duration {
        let slow = self.slow.as_ref().is_none_or(|slow| to.contains(slow.as_str()));
        Duration::from_millis(if slow { self.delay_ms } else { 0 })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mail {
    /// Whom it is for.
    pub to: Vec<String>,
    /// Its Message-ID.
    pub message_id: String,
    pub subject: String,
    pub text: String,
}

#[derive(Default)]
struct Shared {
    behaviour: Behaviour,
    mails: VecDeque<Mail>,
    bytes: usize,
    stats: Stats,
}

/// What it has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Mails that it got, also those that it no longer keeps.
    pub received: u64,
    /// Conversations that were begun.
    pub conversations: u64,
    /// Those under way.
    pub open: u64,
    /// Most conversations under way at once.
    pub most_at_once: u64,
}

type Kept = Arc<Mutex<Shared>>;

fn lock(kept: &Kept) -> MutexGuard<'_, Shared> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sink with its ports open.
pub struct MailSink {
    admin: TcpListener,
    smtp: TcpListener,
}

impl MailSink {
    /// Opens the ports.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let Settings { bind_address, port, smtp_port } = *settings;
        Ok(Self { admin: listen(bind_address, port)?, smtp: listen(bind_address, smtp_port)? })
    }

    /// Addresses of the admin interface and of SMTP.
    pub fn addresses(&self) -> std::io::Result<[SocketAddr; 2]> {
        Ok([self.admin.local_addr()?, self.smtp.local_addr()?])
    }

    /// Serves until `stop` is over.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let kept = Kept::default();
        let stopping = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(serve(self.admin, router(&kept), Limits::default(), stopping.clone(), Duration::from_secs(1)));
        let accepting = stopping.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = accept(self.smtp, kept) => {}
                () = accepting.cancelled() => {}
            }
        });
        tracing::info!("started");
        stop.await;
        stopping.cancel();
        tasks.close();
        tasks.wait().await;
    }
}

fn router(kept: &Kept) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }))
        .route("/mails", get(mails))
        .route("/stats", get(|State(kept): State<Kept>| async move { Json(lock(&kept).stats) }))
        .route("/behaviour", put(behave))
        .with_state(Arc::clone(kept))
}

async fn mails(State(kept): State<Kept>) -> Json<Value> {
    let mails: Vec<Mail> = lock(&kept).mails.iter().cloned().collect();
    Json(json!({ "mails": mails }))
}

async fn behave(State(kept): State<Kept>, body: Bytes) -> Response {
    match serde_json::from_slice::<Behaviour>(&body) {
        Ok(behaviour) => {
            tracing::info!(?behaviour, "behavior changed");
            lock(&kept).behaviour = behaviour.clone();
            Json(behaviour).into_response()
        }
        Err(error) => problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()),
    }
}

async fn accept(listener: TcpListener, kept: Kept) {
    let places = Arc::new(Semaphore::new(MAX_CONVERSATIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Such as for want of file descriptors.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let kept = Arc::clone(&kept);
        tokio::spawn(async move {
            let _place = place;
            if !lock(&kept).behaviour.down {
                let _under_way = UnderWay::begin(&kept);
                // A client that leaves in the middle has said what it wanted.
                let _ = converse(stream, &kept).await;
            }
        });
    }
}

/// Counts a conversation while it lasts.
struct UnderWay<'a>(&'a Kept);

impl<'a> UnderWay<'a> {
    fn begin(kept: &'a Kept) -> Self {
        let mut shared = lock(kept);
        let stats = &mut shared.stats;
        stats.conversations += 1;
        stats.open += 1;
        stats.most_at_once = stats.most_at_once.max(stats.open);
        drop(shared);
        Self(kept)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        lock(self.0).stats.open -= 1;
    }
}

/// RFC 5321, as much of it as a client needs.
async fn converse(stream: TcpStream, kept: &Kept) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut mail = Envelope::default();
    let refused = lock(kept).behaviour.reply(Phase::Connect, "");
    write.write_all(format!("{}\r\n", refused.as_deref().unwrap_or("220 mail-sink ready")).as_bytes()).await?;
    loop {
        let Some(line) = line(&mut read).await? else { return Ok(()) };
        let behaviour = lock(kept).behaviour.clone();
        if behaviour.down {
            return Ok(());
        }
        let verb = line.get(..4).unwrap_or_default().to_ascii_uppercase();
        let hangs = |part: &String| verb == "RCPT" && line.contains(part.as_str());
        if behaviour.hang || behaviour.hang_recipient.as_ref().is_some_and(hangs) {
            tokio::time::sleep(SILENCE).await;
        }
        if verb == "RSET" {
            tokio::time::sleep(Duration::from_millis(behaviour.reset_delay_ms)).await;
        }
        let answer = match verb.as_str() {
            "DATA" if behaviour.reply(Phase::Data, &mail.to.join(" ")).is_none() && !mail.to.is_empty() => {
                write.write_all(b"354 end with a dot on a line of its own\r\n").await?;
                let Some(text) = text(&mut read).await? else { return Ok(()) };
                let to = mail.end();
                let recipients = to.join(" ");
                let refused = behaviour.reply(Phase::End, &recipients);
                if refused.is_none() {
                    keep(kept, to, text);
                }
                tokio::time::sleep(behaviour.delay(&recipients)).await;
                if behaviour.take_then_close {
                    return Ok(());
                }
                refused.unwrap_or_else(|| "250 2.0.0 taken".to_owned())
            }
            "QUIT" if behaviour.hang_at_end => {
                tokio::time::sleep(SILENCE).await;
                return Ok(());
            }
            "QUIT" => {
                write.write_all(b"221 2.0.0 bye\r\n").await?;
                return Ok(());
            }
            _ => answer(&behaviour, &verb, &line, &mut mail),
        };
        write.write_all(format!("{answer}\r\n").as_bytes()).await?;
    }
}

/// The mail under way, and whether its sender is known.
#[derive(Default)]
struct Envelope {
    is_known: bool,
    begun: bool,
    to: Vec<String>,
}

impl Envelope {
    /// Whom it was for; the next one begins anew.
    fn end(&mut self) -> Vec<String> {
        self.begun = false;
        std::mem::take(&mut self.to)
    }
}

/// The answer to a command that needs nothing more.
fn answer(behaviour: &Behaviour, verb: &str, line: &str, mail: &mut Envelope) -> String {
    let contains = |part: &Option<String>| part.as_ref().is_some_and(|part| line.contains(part.as_str()));
    let phase = match verb {
        "EHLO" | "HELO" => Some(Phase::Helo),
        "MAIL" => Some(Phase::Mail),
        "RCPT" => Some(Phase::Rcpt),
        "DATA" => Some(Phase::Data),
        _ => None,
    };
    let of = if phase == Some(Phase::Data) { mail.to.join(" ") } else { line.to_owned() };
    if let Some(reply) = phase.and_then(|phase| behaviour.reply(phase, &of)) {
        return reply;
    }
    let answer = match verb {
        "EHLO" | "HELO" if behaviour.needs_dotted_helo && !line.contains('.') && !line.contains("[IPv6:") => {
            "504 5.5.2 Helo command rejected: need fully-qualified hostname"
        }
        "EHLO" if behaviour.login.is_some() => "250-mail-sink\r\n250-AUTH PLAIN\r\n250-8BITMIME\r\n250 SMTPUTF8",
        "EHLO" if behaviour.no_smtp_utf8 => "250-mail-sink\r\n250 8BITMIME",
        "EHLO" => "250-mail-sink\r\n250-8BITMIME\r\n250 SMTPUTF8",
        "HELO" => "250 mail-sink",
        "AUTH" => match &behaviour.login {
            Some(login) if login.is(line.get("AUTH PLAIN ".len()..).unwrap_or_default()) => {
                mail.is_known = true;
                "235 2.7.0 welcome"
            }
            Some(_) => "535 5.7.8 who are you?",
            None => "502 5.5.1 not understood",
        },
        "MAIL" if behaviour.login.is_some() && !mail.is_known => "530 5.7.0 log in first",
        "MAIL" if behaviour.refuse_sender => "550 5.7.1 who are you?",
        "MAIL" if behaviour.try_later => "451 4.3.0 try again later",
        // As RFC 5321 has it: one mail after the other.
        "MAIL" if mail.begun => "503 5.5.1 a mail is under way",
        "MAIL" => {
            mail.begun = true;
            "250 2.1.0 ok"
        }
        "RSET" => {
            mail.end();
            "250 2.0.0 ok"
        }
        "NOOP" => "250 2.0.0 ok",
        "RCPT" if contains(&behaviour.refuse) => "550 5.1.1 there is nobody of that name",
        "RCPT" if contains(&behaviour.greylist) => "451 4.7.1 come back later",
        "RCPT" => {
            let address = line.split(['<', '>']).nth(1).unwrap_or_default();
            mail.to.push(address.to_owned());
            "250 2.1.5 ok"
        }
        "DATA" => "503 5.5.1 RCPT first",
        _ => "502 5.5.1 not understood",
    };
    answer.to_owned()
}

fn keep(kept: &Kept, to: Vec<String>, text: String) {
    let header = |name: &str| {
        let mut head = text.lines().take_while(|line| !line.is_empty());
        let value = head.find_map(|line| line.strip_prefix(name));
        value.unwrap_or_default().trim().to_owned()
    };
    let (message_id, subject) = (header("Message-ID:"), header("Subject:"));
    let mail = Mail { to, message_id, subject, text };
    let shown: Vec<_> = mail.to.iter().map(|to| redacted_address(to)).collect();
    tracing::info!(to = ?shown, message_id = %mail.message_id, subject = %mail.subject, "mail received");
    let mut kept = lock(kept);
    kept.stats.received += 1;
    kept.bytes += mail.text.len();
    kept.mails.push_back(mail);
    while kept.bytes > MAX_KEPT_BYTES {
        let Some(oldest) = kept.mails.pop_front() else { return };
        kept.bytes -= oldest.text.len();
    }
}

/// One line without its end; `None`: the client has left.
async fn line(read: &mut (impl AsyncBufReadExt + Unpin)) -> std::io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut bounded = read.take(MAX_LINE_BYTES);
    match tokio::time::timeout(SILENCE, bounded.read_until(b'\n', &mut line)).await {
        Ok(Ok(0)) | Err(_) => Ok(None),
        Ok(result) => result.map(|_| Some(String::from_utf8_lossy(&line).trim_end().to_owned())),
    }
}

/// A mail's text, up to the line with a dot; `None`: it never came, or is too large.
async fn text(read: &mut (impl AsyncBufReadExt + Unpin)) -> std::io::Result<Option<String>> {
    let mut text = String::new();
    loop {
        let Some(line) = line(read).await? else { return Ok(None) };
        if line == "." {
            return Ok(Some(text));
        }
        if text.len() + line.len() > MAX_MAIL_BYTES {
            return Ok(None);
        }
        text.push_str(line.strip_prefix('.').unwrap_or(&line));
        text.push('\n');
    }
}
