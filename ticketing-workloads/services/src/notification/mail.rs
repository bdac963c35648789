//! Mails: how they are put together, and how they get to the mail server.

use super::Settings;
use super::outbox::{Kind, Message};
use super::refusal::{Fault, Phase, Reply, fault};
use super::sessions::{self, Server, Session, Sessions, not_sent};
use crate::host::StartError;
use crate::mail_address::{AddressError, MailAddress};
use lettre::address::Envelope;
use lettre::message::header::ContentType;
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::TlsParameters;
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::{Extension, MailBodyParameter, MailParameter};
use resilience::{CallError, Dependency, Failure, FailureKind};
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
        "the mail server does not offer SMTPUTF8 and 8BITMIME, which a name with letters other than those of ASCII needs; the \
         mail waits until SMTP_HOST names one that does"
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

/// A mail that was not sent.
#[derive(Debug)]
pub struct NotSent {
    pub error: CallError<MailError>,
    /// Whether the server may have taken it all the same.
    pub may_be_sent: bool,
    /// Whether the server had come as far as this mail's recipient.
    pub about_a_mail: bool,
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
        let wrong_from =
            |error| StartError::Setting(format!("MAIL_FROM must be an address, such as tickets@example.com: {error}"));
        let wrong_host = |error| StartError::Setting(format!("SMTP_HOST {host}: {error}"));
        let tls = TlsParameters::new(host.clone()).map_err(wrong_host)?;
        let mut server = Server::new(host.clone(), settings.smtp_port, settings.smtp_encryption, tls);
        server.login = settings.smtp_user.clone().zip(settings.smtp_password.clone()).map(Credentials::from);
        server.hello = sessions::hello(&settings.mail_helo_name).map_err(StartError::Setting)?;
        let sessions = Sessions::new(server);
        Ok(Self { sessions, dependency, from: mail_from.parse().map_err(wrong_from)? })
    }

    /// Puts a mail together. Its Message-ID is that of the message, however often it is sent.
    pub fn compose(
        &self,
        message: &Message,
        address: &str,
        ticket: Option<Vec<u8>>,
    ) -> Result<lettre::Message, ComposeError> {
        let to = MailAddress::parse(address)?.address().clone();
        // Or it would be read out of the header again, by a stricter eye.
        let envelope = Envelope::new(Some(self.from.email.clone()), vec![to.clone()])?;
        let Message { booking, event, kind, .. } = message;
        let subject = match kind {
            Kind::BookingConfirmed => format!("Your booking for {event}"),
            Kind::Ticket => format!("Your ticket for {event}"),
        };
        let builder = lettre::Message::builder()
            .envelope(envelope)
            .from(self.from.clone())
            .to(Mailbox::new(None, to))
            .subject(one_line(&subject))
            .message_id(Some(format!("<{booking}.{}@ticketwave>", kind.name())));
        let text = text(message, ticket.is_some());
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

    pub async fn send(&self, mail: &lettre::Message) -> Result<(), NotSent> {
        // Until its text has left, nobody can have taken it, and after an answer everybody knows.
        let unanswered = AtomicBool::new(false);
        let about_a_mail = AtomicBool::new(false);
        let text = mail.formatted();
        let once = || async {
            // Whatever the policy has retried: a mail that may have been taken is not sent again without being counted.
            if unanswered.load(Ordering::Relaxed) {
                return Err(MailError::Broken("the attempt before had no answer".to_owned()));
            }
            about_a_mail.store(false, Ordering::Relaxed);
            let mut session = self.prepare(mail, &text, &about_a_mail).await?;
            unanswered.store(true, Ordering::Relaxed);
            let error = match session.connection.message(&text).await {
                Ok(_) => None,
                Err(error) => match sessions::reply(&error, Phase::End) {
                    Some(reply) => Some(reply),
                    None => return Err(MailError::Broken(sessions::in_words(&error))),
                },
            };
            unanswered.store(false, Ordering::Relaxed);
            match error {
                None => {
                    self.sessions.keep(session);
                    Ok(())
                }
                Some(reply) => {
                    if reply.code == 421 {
                        session.end();
                    } else {
                        self.sessions.keep(session);
                    }
                    Err(reply.into())
                }
            }
        };
        let sent = self.dependency.call(once).await;
        sent.map_err(|error| NotSent {
            error,
            may_be_sent: unanswered.into_inner(),
            about_a_mail: about_a_mail.into_inner(),
        })
    }

    /// Ends the conversations that nobody needed for a while.
    pub fn end_idle(&self) {
        self.sessions.end_idle();
    }

    /// As far as the server is ready to take the text. `about_a_mail` is set once it is asked about the recipient.
    async fn prepare(
        &self,
        mail: &lettre::Message,
        text: &[u8],
        about_a_mail: &AtomicBool,
    ) -> Result<Session, MailError> {
        let connect = self.dependency.timeouts().connect_ms.map_or(CONNECT, Duration::from_millis);
        let mut session = self.sessions.take(connect).await?;
        let mut begun = begin_mail(&mut session, mail, text).await;
        // A conversation that was kept may be over, or have had its share of mails: nothing has left yet, so a new one is begun.
        if session.was_used() && begun.as_ref().is_err_and(|error| !matches!(error, MailError::NoSmtpUtf8)) {
            session = self.sessions.begin(connect).await?;
            begun = begin_mail(&mut session, mail, text).await;
        }
        if let Err(error) = begun {
            session.end();
            return Err(error);
        }
        about_a_mail.store(true, Ordering::Relaxed);
        for to in mail.envelope().to() {
            if let Err(error) = session.connection.command(Rcpt::new(to.clone(), Vec::new())).await {
                return Err(self.give_up(session, not_sent(&error, Phase::Recipient)));
            }
        }
        if let Err(error) = session.connection.command(Data).await {
            return Err(self.give_up(session, not_sent(&error, Phase::Data)));
        }
        Ok(session)
    }

    /// Keeps the conversation if the server goes on with it.
    fn give_up(&self, session: Session, error: MailError) -> MailError {
        match &error {
            MailError::Refused(reply) if reply.code != 421 => self.sessions.reset_and_keep(session),
            _ => session.end(),
        }
        error
    }
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

fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn text(message: &Message, with_ticket: bool) -> String {
    let Message { booking, user, seats, amount_cents, event, starts_at, .. } = message;
    let mut text = format!("Hello {},\n\nyour booking is confirmed.\n\n", one_line(user));
    let _ = writeln!(text, "  Event    {}", one_line(event));
    if let Some(starts_at) = starts_at {
        let _ = writeln!(text, "  Starts   {starts_at}");
    }
    let _ = writeln!(text, "  Seats    {seats}");
    let _ = writeln!(text, "  Paid     {}.{:02} EUR", amount_cents / 100, amount_cents % 100);
    let _ = writeln!(text, "  Booking  {booking}");
    text.push_str(if with_ticket {
        "\nYour ticket is attached. Show its code at the entrance.\n"
    } else {
        "\nYour ticket follows in another mail.\n"
    });
    text
}
