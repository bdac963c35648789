//! Mails: how they are put together, and how they get to the mail server.

use super::Settings;
use super::access::{self, Login};
use super::outbox::Message;
use super::refusal::{Fault, Phase, Reply, fault};
use super::sessions::{self, Server, Session, Sessions, not_sent};
use super::texts;
use crate::host::StartError;
use crate::mail_address::{AddressError, MailAddress};
use contract::TimeoutSettings;
use lettre::address::Envelope;
use lettre::message::header::ContentType;
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::Error as SmtpError;
use lettre::transport::smtp::commands::{Data, Mail, Noop, Rcpt};
use lettre::transport::smtp::extension::{Extension, MailBodyParameter, MailParameter};
use resilience::clock::in_words;
use resilience::{CallError, Dependency, Failure, FailureKind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long an address of the mail server has to take a connection, where neither policy nor built-in says it.
const CONNECT: Duration = Duration::from_secs(3);

/// Why a mail was not sent.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    /// The server said no; whose fault that is says [`fault`].
    #[error("the mail server refused {0}")]
    Refused(#[from] Reply),
    /// There was no connection, or it broke before the mail had left.
    #[error("not sent to the mail server: {0}")]
    NotSent(String),
    /// The connection broke after the mail had left: it may have been taken.
    #[error("delivery outcome unknown: {0}")]
    Broken(String),
    /// The address has letters for which the server would have to know RFC 6531.
    #[error(
        "the mail server does not offer SMTPUTF8 and 8BITMIME, which a name with letters other than those of ASCII needs; \
         SMTP_HOST would have to name one that does"
    )]
    NoSmtpUtf8,
}

impl Failure for MailError {
    fn kind(&self) -> FailureKind {
        match self {
            // It closes the door on everybody.
            Self::Refused(reply) if reply.code == 421 => FailureKind::Other,
            Self::Refused(reply) => match fault(reply) {
                // It answers, so it works; that one address is wrong is not its fault.
                Fault::Recipient => FailureKind::Business,
                // It answers. What it does not like about this service pauses the drain, which probes sooner than a circuit.
                Fault::PerhapsRecipient | Fault::Mail | Fault::Unclear | Fault::Relay => FailureKind::RateLimited,
            },
            Self::NoSmtpUtf8 => FailureKind::Business,
            Self::NotSent(_) => FailureKind::NotSent,
            // One that broke is not tried again at once: it may have been taken.
            Self::Broken(_) => FailureKind::Other,
        }
    }
}

/// Why a mail could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// No mail can be sent to the address. Orders are checked in the same way: this one is from before that.
    #[error("invalid mail address: it {0}; correct bookings.email and requeue the mail")]
    Address(#[from] AddressError),
    /// Something in it cannot be in a mail.
    #[error("failed to compose the mail: {0}")]
    Message(#[from] lettre::error::Error),
}

/// A mail that was not sent, and whether the server knows of it.
#[derive(Debug)]
pub struct NotSent {
    pub error: CallError<MailError>,
    /// Whether the server may have taken it all the same.
    pub may_be_sent: bool,
    /// Whether the server had come as far as this mail's recipient.
    pub about_a_mail: bool,
}

/// The end of a mail that the server has not answered yet.
type Ending = Pin<Box<dyn Future<Output = Ended> + Send>>;
type Ended = (Session, Result<(), SmtpError>);

/// What the server answered to a mail.
enum Answer {
    Taken,
    /// It is about this mail, or about this service; the server works.
    No(MailError),
    /// Nothing yet to the end of the mail.
    Late(Ending),
}

/// Puts mails together and sends them.
pub struct Mailer {
    sessions: Sessions,
    dependency: &'static Dependency,
    from: Mailbox,
}

impl Mailer {
    /// Sends by the server of the settings, through the layers of `dependency`.
    pub fn new(settings: &Settings, dependency: &'static Dependency) -> Result<Self, StartError> {
        let Settings { smtp_host: host, mail_from, .. } = settings;
        let tls = access::tls(host, settings.smtp_ca_file.as_deref())?;
        let mut server = Server::new(host.clone(), settings.smtp_port, settings.smtp_encryption, tls);
        server.login = Login::new(settings)?;
        server.hello = sessions::hello(&settings.mail_helo_name).map_err(StartError::Setting)?;
        let sessions = Sessions::new(server, usize::from(settings.mail_sessions));
        Ok(Self { sessions, dependency, from: sender(mail_from)? })
    }

    /// Puts a mail together.
    pub fn compose(
        &self,
        message: &Message,
        address: &str,
        ticket: Option<Vec<u8>>,
    ) -> Result<lettre::Message, ComposeError> {
        compose(&self.from, message, address, ticket)
    }

    /// Sends a mail. What the server does with this one says nothing about the next one, so the circuit hears of it only if
    /// the connection is lost. The server has until `until` to answer to the end of the mail: only then is it known whether it
    /// was taken, so that answer is waited for as long as nobody else sends it.
    pub async fn send(&self, mail: &lettre::Message, until: Instant) -> Result<(), NotSent> {
        // Until its text has left, nobody can have taken it, and after an answer everybody knows.
        let (unanswered, about_a_mail) = (AtomicBool::new(false), AtomicBool::new(false));
        let text: Arc<[u8]> = mail.formatted().into();
        let TimeoutSettings { request_ms, per_try_ms, .. } = self.dependency.timeouts();
        // Before the layers break it off, so that the end of it is not lost.
        let most_of = |ms: u64| Duration::from_millis(ms / 10 * 9);
        let begin = Instant::now();
        let once = || async {
            // Whatever the policy has retried: a mail that may have been taken is not sent again without being counted.
            if unanswered.load(Ordering::Relaxed) {
                return Err(MailError::Broken("the attempt before had no answer".to_owned()));
            }
            about_a_mail.store(false, Ordering::Relaxed);
            let patience = (begin + most_of(request_ms)).min(Instant::now() + most_of(per_try_ms));
            let mut session = self.prepare(mail, &text).await?;
            about_a_mail.store(true, Ordering::Relaxed);
            match tokio::time::timeout_at(patience, offer(&mut session, mail)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.refused(session, error),
                Err(_) => {
                    drop(session);
                    let waited = in_words(begin.elapsed());
                    return Ok(Answer::No(MailError::NotSent(format!(
                        "no answer about the recipient within {waited}"
                    ))));
                }
            }
            unanswered.store(true, Ordering::Relaxed);
            let mut ending = Box::pin(end(session, Arc::clone(&text)));
            match tokio::time::timeout_at(patience, &mut ending).await {
                Ok((session, ended)) => {
                    let answer = self.ended(session, ended);
                    let is_known = !matches!(answer, Err(MailError::Broken(_)));
                    unanswered.store(!is_known, Ordering::Relaxed);
                    answer
                }
                Err(_) => Ok(Answer::Late(ending)),
            }
        };
        let answer = match self.dependency.call(once).await {
            Ok(Answer::Late(ending)) => {
                if let Ok((session, ended)) = tokio::time::timeout_at(until, ending).await {
                    self.ended(session, ended)
                } else {
                    let waited = in_words(begin.elapsed());
                    let why = format!("the mail server did not say within {waited} whether it took the mail");
                    Err(MailError::Broken(why))
                }
            }
            Ok(answer) => Ok(answer),
            Err(error) => {
                let (may_be_sent, about_a_mail) = (unanswered.into_inner(), about_a_mail.into_inner());
                return Err(NotSent { error, may_be_sent, about_a_mail });
            }
        };
        let source = match answer {
            Ok(Answer::Taken) => return Ok(()),
            Ok(Answer::No(error)) | Err(error) => error,
            Ok(Answer::Late(_)) => MailError::Broken("no answer".to_owned()),
        };
        let may_be_sent = matches!(source, MailError::Broken(_));
        let error = CallError::Failed { dependency: self.dependency.name().to_owned(), attempts: 1, source };
        Err(NotSent { error, may_be_sent, about_a_mail: true })
    }

    /// Keeps the conversation if the server goes on with it, after it has refused the mail.
    fn refused(&self, session: Session, error: MailError) -> Result<Answer, MailError> {
        match &error {
            MailError::Refused(reply) if reply.code != 421 => {
                self.sessions.reset_and_keep(session);
                Ok(Answer::No(error))
            }
            _ => {
                session.end();
                Err(error)
            }
        }
    }

    /// The same after the end of the mail.
    fn ended(&self, session: Session, ended: Result<(), SmtpError>) -> Result<Answer, MailError> {
        let Err(error) = ended else {
            self.sessions.keep(session);
            return Ok(Answer::Taken);
        };
        match sessions::reply(&error, Phase::End) {
            Some(reply) if reply.code == 421 => {
                session.end();
                Err(reply.into())
            }
            Some(reply) => {
                self.sessions.keep(session);
                Ok(Answer::No(reply.into()))
            }
            None => Err(MailError::Broken(sessions::in_words(&error))),
        }
    }

    /// Whether the server lets this service in, without a mail.
    pub async fn greet(&self) -> Result<(), NotSent> {
        let greet = || async {
            let mut session = self.sessions.begin(self.connect_timeout()).await?;
            // One that took no mail does not count as used.
            let listens = session.connection.command(Noop).await;
            let listens = listens.map(drop).map_err(|error| not_sent(&error, Phase::Connect));
            session.end();
            listens
        };
        let answer = self.dependency.call(greet).await;
        answer.map_err(|error| NotSent { error, may_be_sent: false, about_a_mail: false })
    }

    fn connect_timeout(&self) -> Duration {
        self.dependency.timeouts().connect_ms.map_or(CONNECT, Duration::from_millis)
    }

    /// Ends the conversations that nobody needed for a while.
    pub fn end_idle(&self) {
        self.sessions.end_idle();
    }

    /// As far as the server takes mails of this sender.
    async fn prepare(&self, mail: &lettre::Message, text: &[u8]) -> Result<Session, MailError> {
        let connect = self.connect_timeout();
        let mut session = self.sessions.take(connect).await?;
        let mut begun = begin_mail(&mut session, mail, text).await;
        // A conversation that was kept may be over, or have had its share of mails: nothing has left yet, so a new one is begun.
        if session.was_used() && begun.as_ref().is_err_and(|error| !matches!(error, MailError::NoSmtpUtf8)) {
            session = self.sessions.begin_instead(session, connect).await?;
            begun = begin_mail(&mut session, mail, text).await;
        }
        match begun {
            Ok(()) => Ok(session),
            // Nothing was said, so the next mail finds it as it was.
            Err(error @ MailError::NoSmtpUtf8) => {
                self.sessions.keep(session);
                Err(error)
            }
            Err(error) => {
                session.end();
                Err(error)
            }
        }
    }
}

/// `RCPT TO` and `DATA`: as far as the server is ready to take the text.
async fn offer(session: &mut Session, mail: &lettre::Message) -> Result<(), MailError> {
    for to in mail.envelope().to() {
        let taken = session.connection.command(Rcpt::new(to.clone(), Vec::new())).await;
        taken.map_err(|error| not_sent(&error, Phase::Recipient))?;
    }
    let taken = session.connection.command(Data).await;
    taken.map(drop).map_err(|error| not_sent(&error, Phase::Data))
}

/// The text and its end.
async fn end(mut session: Session, text: Arc<[u8]>) -> Ended {
    let ended = session.connection.message(&text).await.map(drop);
    (session, ended)
}

/// The sender, read as a buyer's address is: in ASCII, or each mail would need a server that knows SMTPUTF8.
fn sender(text: &str) -> Result<Mailbox, StartError> {
    let wrong = |why: &dyn std::fmt::Display| {
        StartError::Setting(format!("MAIL_FROM must be an address, such as tickets@example.com: {why}"))
    };
    let Mailbox { name, email } = text.parse().map_err(|error: lettre::address::AddressError| wrong(&error))?;
    let address = MailAddress::parse(email.as_ref()).map_err(|error| wrong(&format!("it {error}")))?.address().clone();
    if !address.user().is_ascii() {
        return Err(wrong(&"its name has letters other than those of ASCII, which many mail servers do not take"));
    }
    Ok(Mailbox::new(name, address))
}

/// `MAIL FROM`, with what the mail needs the server to know.
async fn begin_mail(session: &mut Session, mail: &lettre::Message, text: &[u8]) -> Result<(), MailError> {
    let envelope = mail.envelope();
    let server = session.connection.server_info();
    let offers = |extension| server.supports_feature(extension);
    let is_ascii = |address: &lettre::Address| AsRef::<str>::as_ref(address).is_ascii();
    let mut parameters = Vec::new();
    if !envelope.to().iter().chain(envelope.from()).all(is_ascii) {
        if !offers(Extension::SmtpUtfEight) || !offers(Extension::EightBitMime) {
            return Err(MailError::NoSmtpUtf8);
        }
        parameters.push(MailParameter::SmtpUtfEight);
    }
    if !text.is_ascii() && offers(Extension::EightBitMime) {
        parameters.push(MailParameter::Body(MailBodyParameter::EightBitMime));
    }
    let taken = session.connection.command(Mail::new(envelope.from().cloned(), parameters)).await;
    taken.map(drop).map_err(|error| not_sent(&error, Phase::Sender))
}

/// Puts a mail together. Its Message-ID is that of the message, however often it is sent.
fn compose(
    from: &Mailbox,
    message: &Message,
    address: &str,
    ticket: Option<Vec<u8>>,
) -> Result<lettre::Message, ComposeError> {
    let to = MailAddress::parse(address)?.address().clone();
    // Or it would be read out of the header again, by a stricter eye.
    let envelope = Envelope::new(Some(from.email.clone()), vec![to.clone()])?;
    let Message { booking, kind, .. } = message;
    let builder = lettre::Message::builder()
        .envelope(envelope)
        .from(from.clone())
        .to(Mailbox::new(None, to))
        .subject(texts::subject(message))
        .message_id(Some(format!("<{booking}.{}@ticketwave>", kind.name())));
    let text = texts::body(message, ticket.is_some());
    Ok(match ticket {
        None => builder.header(ContentType::TEXT_PLAIN).body(text)?,
        Some(ticket) => {
            let attachment = Attachment::new(format!("ticket-{booking}.pdf"));
            let pdf = ContentType::parse("application/pdf").unwrap_or(ContentType::TEXT_PLAIN);
            builder.multipart(
                MultiPart::mixed().singlepart(SinglePart::plain(text)).singlepart(attachment.body(ticket, pdf)),
            )?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::booking::order::Order;
    use crate::notification::outbox::Kind;
    use proptest::prelude::*;

    #[rstest::rstest]
    #[case("tickets@example.com", Some("tickets@example.com"))]
    #[case("Ticket Wave <Tickets@Example.com>", Some("Tickets@example.com"))]
    #[case("TicketWave <tickets@münchen.example>", Some("tickets@xn--mnchen-3ya.example"))]
    #[case("tickets", None)]
    #[case("tickets@localhost", None)]
    #[case("tickets@[192.0.2.1]", None)]
    #[case("kärten@example.com", None)]
    fn senders(#[case] text: &str, #[case] address: Option<&str>) {
        let sender = sender(text);
        assert_eq!(sender.as_ref().ok().map(|sender| sender.email.as_ref()), address);
        if let Err(error) = sender {
            assert!(error.to_string().starts_with("MAIL_FROM must be an address"), "{error}");
        }
    }

    fn can_be_mailed(address: &str) -> bool {
        let message = Message::example(Kind::BookingConfirmed, "Opening Night");
        let sent = compose(&sender("tickets@example.com").unwrap(), &message, address, None);
        sent.is_ok_and(|mail| mail.envelope().to().len() == 1)
    }

    fn is_taken(address: &str) -> bool {
        let order =
            serde_json::json!({"eventId": message_event(), "userId": "ann", "ticketCount": 1, "email": address});
        Order::read(order.to_string().as_bytes(), None).is_ok()
    }

    fn message_event() -> String {
        Message::example(Kind::Ticket, "x").event_id.to_string()
    }

    proptest! {
        /// What is sold can be mailed, and what could be mailed is sold.
        #[test]
        fn an_address_is_taken_where_it_can_be_mailed(
            name in "[a-zäउ東.+\"' ()<>@\\\\-]{0,12}",
            domain in "[a-zü例.-]{0,12}(\\.[a-z]{2,6})?",
            anything in ".{0,40}",
        ) {
            for address in [format!("{name}@{domain}"), format!("ann@{domain}"), format!("{name}@example.com"), anything] {
                prop_assert_eq!(is_taken(&address), can_be_mailed(&address), "{}", address);
            }
        }
    }
}
