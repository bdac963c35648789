//! Mails: how they are put together, and how they get to the mail server.

use super::Settings;
use super::outbox::{Kind, Message};
use crate::host::StartError;
use lettre::address::Envelope;
use lettre::message::header::ContentType;
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::authentication::{Credentials, DEFAULT_MECHANISMS};
use lettre::transport::smtp::client::{AsyncSmtpConnection, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::ClientId;
use resilience::{CallError, Dependency, Failure, FailureKind};
use std::error::Error;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long the end of a conversation may take.
const GOODBYE: Duration = Duration::from_secs(1);

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

/// Why a mail was not sent.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    /// The server will never take it (5xx to its recipient or its text).
    #[error("the mail server refused the mail: {0}")]
    Refused(String),
    /// The server may take it later (4xx, or it refuses this service as such).
    #[error("the mail server asked to try later: {0}")]
    TryLater(String),
    /// The server may take mails to this address later (4xx): others it takes.
    #[error("the mail server asked to try this recipient later: {0}")]
    RecipientLater(String),
    /// There was no connection, or it broke before the mail had left.
    #[error("not sent to the mail server: {0}")]
    NotSent(String),
    /// The connection broke after the mail had left: it may have been taken.
    #[error("delivery outcome unknown: {0}")]
    Broken(String),
}

impl Failure for MailError {
    fn kind(&self) -> FailureKind {
        match self {
            // It answers, so it works; that one address is wrong is not its fault.
            Self::Refused(_) => FailureKind::Business,
            // Which of the two is at fault is not known.
            Self::RecipientLater(_) => FailureKind::RateLimited,
            Self::NotSent(_) => FailureKind::NotSent,
            // One that broke is not tried again at once: it may have been taken.
            Self::TryLater(_) | Self::Broken(_) => FailureKind::Other,
        }
    }
}

/// Why a mail could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The address is none.
    #[error("invalid mail address `{address}`: {source}")]
    Address { address: String, source: lettre::address::AddressError },
    /// The address has letters that not every server takes.
    #[error("`{address}` has letters other than those of ASCII, which mail servers refuse")]
    Letters { address: String },
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
}

/// Puts mails together and sends them.
pub struct Mailer {
    server: (String, u16),
    encryption: Encryption,
    tls: TlsParameters,
    login: Option<Credentials>,
    hello: ClientId,
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
        Ok(Self {
            server: (host.clone(), settings.smtp_port),
            encryption: settings.smtp_encryption,
            tls: TlsParameters::new(host.clone()).map_err(wrong_host)?,
            login: settings.smtp_user.clone().zip(settings.smtp_password.clone()).map(Credentials::from),
            hello: ClientId::Domain(settings.pod.pod_name.clone()),
            dependency,
            from: mail_from.parse().map_err(wrong_from)?,
        })
    }

    /// Puts a mail together. Its Message-ID is that of the message, however often it is sent.
    pub fn compose(
        &self,
        message: &Message,
        address: &str,
        ticket: Option<Vec<u8>>,
    ) -> Result<lettre::Message, ComposeError> {
        let to: lettre::Address =
            address.parse().map_err(|source| ComposeError::Address { address: address.to_owned(), source })?;
        if !address.is_ascii() {
            return Err(ComposeError::Letters { address: address.to_owned() });
        }
        let Message { booking, event, kind, .. } = message;
        let subject = match kind {
            Kind::BookingConfirmed => format!("Your booking for {event}"),
            Kind::Ticket => format!("Your ticket for {event}"),
            Kind::BookingCancelled => format!("Your booking for {event} is cancelled"),
        };
        let builder = lettre::Message::builder()
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
        let once = || async {
            // Whatever the policy has retried: a mail that may have been taken is not sent again without being counted.
            if unanswered.load(Ordering::Relaxed) {
                return Err(MailError::Broken("the attempt before had no answer".to_owned()));
            }
            let mut server = self.connect(mail.envelope()).await?;
            unanswered.store(true, Ordering::Relaxed);
            let taken = server.message(&mail.formatted()).await.map_err(|error| classify(&error, Stage::Text));
            if !matches!(taken, Err(MailError::Broken(_))) {
                unanswered.store(false, Ordering::Relaxed);
            }
            // How the conversation ends matters to nobody: nobody waits for it.
            tokio::spawn(async move { tokio::time::timeout(GOODBYE, server.quit()).await.map(drop) });
            taken.map(drop)
        };
        let sent = self.dependency.call(once).await;
        sent.map_err(|error| NotSent { error, may_be_sent: unanswered.into_inner() })
    }

    /// As far as the server is ready to take the text.
    async fn connect(&self, envelope: &Envelope) -> Result<AsyncSmtpConnection, MailError> {
        let mut server = self.log_in(envelope).await.map_err(|error| classify(&error, Stage::Greeting))?;
        for to in envelope.to() {
            let taken = server.command(Rcpt::new(to.clone(), Vec::new())).await;
            taken.map_err(|error| classify(&error, Stage::Recipient))?;
        }
        server.command(Data).await.map_err(|error| classify(&error, Stage::Greeting))?;
        Ok(server)
    }

    async fn log_in(&self, envelope: &Envelope) -> Result<AsyncSmtpConnection, lettre::transport::smtp::Error> {
        let wrapped = (self.encryption == Encryption::Tls).then(|| self.tls.clone());
        let (host, port) = &self.server;
        let mut server =
            AsyncSmtpConnection::connect_tokio1((host.as_str(), *port), None, &self.hello, wrapped, None).await?;
        if self.encryption == Encryption::Starttls {
            server.starttls(self.tls.clone(), &self.hello).await?;
        }
        if let Some(login) = &self.login {
            server.auth(DEFAULT_MECHANISMS, login).await?;
        }
        server.command(Mail::new(envelope.from().cloned(), Vec::new())).await?;
        Ok(server)
    }
}

/// How far a conversation has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is about this service and the server.
    Greeting,
    /// It is about who gets the mail.
    Recipient,
    /// The text has left.
    Text,
}

/// Whether a "later" concerns every mail: the server closes (421), or has no room (452).
fn is_about_the_server(error: &lettre::transport::smtp::Error) -> bool {
    error.status().is_some_and(|code| matches!(u16::from(code), 421 | 452))
}

/// A "never" counts only where it is about this mail: a wrong password is none of its fault, and is put right some day.
fn classify(error: &lettre::transport::smtp::Error, stage: Stage) -> MailError {
    let mut words = error.to_string();
    if let Some(cause) = error.source() {
        let _ = write!(words, ": {cause}");
    }
    if error.is_permanent() && stage != Stage::Greeting {
        MailError::Refused(words)
    } else if error.is_transient() && stage == Stage::Recipient && !is_about_the_server(error) {
        MailError::RecipientLater(words)
    } else if error.is_permanent() || error.is_transient() {
        MailError::TryLater(words)
    } else if stage == Stage::Text {
        MailError::Broken(words)
    } else {
        MailError::NotSent(words)
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn text(message: &Message, with_ticket: bool) -> String {
    let Message { booking, user, seats, amount_cents, event, starts_at, .. } = message;
    let is_cancelled = message.kind == Kind::BookingCancelled;
    let stands = if is_cancelled {
        "your booking is cancelled: the payment was declined or did not come to an end in time. You pay nothing; should something\n\
         have been charged all the same, it is refunded"
    } else {
        "your booking is confirmed"
    };
    let mut text = format!("Hello {},\n\n{stands}.\n\n", one_line(user));
    let _ = writeln!(text, "  Event    {}", one_line(event));
    if let Some(starts_at) = starts_at {
        let _ = writeln!(text, "  Starts   {starts_at}");
    }
    let _ = writeln!(text, "  Seats    {seats}");
    let amount = if is_cancelled { "Not paid" } else { "Paid    " };
    let _ = writeln!(text, "  {amount} {}.{:02} EUR", amount_cents / 100, amount_cents % 100);
    let _ = writeln!(text, "  Booking  {booking}");
    text.push_str(if is_cancelled {
        "\nThe seats are free again.\n"
    } else if with_ticket {
        "\nYour ticket is attached. Show its code at the entrance.\n"
    } else {
        "\nYour ticket follows in another mail.\n"
    });
    text
}
