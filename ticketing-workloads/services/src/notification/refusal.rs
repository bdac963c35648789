//! Whose fault a refusal is: the recipient's, that of this one mail, or the relay's towards this service. Pure.
//!
//! Three things tell: the step of the conversation, the reply code (RFC 5321) and the enhanced code (RFC 3463). Where servers
//! use one answer for several things, their words decide, and what stays unclear is never a dead letter on its own.

use crate::mail_address::redacted;
use std::fmt;

/// Longest text of a server that is kept, in characters.
const MAX_TEXT: usize = 400;

/// A step of the conversation with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connection, greeting and EHLO.
    Connect,
    StartTls,
    Login,
    Sender,
    Recipient,
    Data,
    /// The text has left.
    End,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "greeting or EHLO",
            Self::StartTls => "STARTTLS",
            Self::Login => "AUTH",
            Self::Sender => "MAIL FROM",
            Self::Recipient => "RCPT TO",
            Self::Data => "DATA",
            Self::End => "the end of the mail",
        })
    }
}

/// A server's "no".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at {phase}: {code} {text}")]
pub struct Reply {
    pub phase: Phase,
    pub code: u16,
    /// Class, subject and detail, as in 5.1.1.
    pub enhanced: Option<(u16, u16, u16)>,
    /// What it said, the enhanced code included; addresses are redacted.
    pub text: String,
}

impl Reply {
    pub fn new(phase: Phase, code: u16, text: &str) -> Self {
        let enhanced = text.split_whitespace().next().and_then(enhanced_code);
        Self { phase, code, enhanced, text: redacted(&plain(text)).chars().take(MAX_TEXT).collect() }
    }

    /// Whether it may be about this mail at all, and not only about this service.
    pub fn is_about_a_mail(&self) -> bool {
        self.phase >= Phase::Recipient && self.code != 421
    }
}

/// On one line, and without what a text in a database or a terminal must not have.
pub fn plain(text: &str) -> String {
    let text = text.replace(|letter: char| letter.is_control(), " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn enhanced_code(word: &str) -> Option<(u16, u16, u16)> {
    let mut parts = word.trim_end_matches([':', ';', ',']).splitn(3, '.').map(|part| part.parse::<u16>().ok());
    match (parts.next()??, parts.next()??, parts.next()??) {
        code @ (2 | 4 | 5, _, _) => Some(code),
        _ => None,
    }
}

/// Whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The recipient's, for ever.
    Recipient,
    /// Probably the recipient's: a bare 550 to `RCPT TO`. Some servers say just that to clients that they do not like.
    PerhapsRecipient,
    /// This mail's, for now, as with greylisting: it says nothing about others.
    Mail,
    /// This mail's or the relay's: what happens to other mails tells.
    Unclear,
    /// The relay's towards this service: it would refuse other mails as well.
    Relay,
}

/// Words about the sender or this client, which no code of a recipient outweighs.
const ABOUT_US: [&str; 18] = [
    "sender address",
    "client host",
    "blocked using",
    "sendasdenied",
    "send as denied",
    "not allowed to send from",
    "not allowed to send as",
    "submission quota",
    "submissionquota",
    "outboundspam",
    "sending limit",
    "sending quota",
    "sending rate",
    "message quota",
    "daily limit",
    "daily quota",
    "spf record",
    "relay access denied",
];
/// The same where they are a word of their own.
const ABOUT_US_WORDS: [&str; 2] = ["helo", "ehlo"];
/// Words by which an answer without a clear code is more likely about this service than about a mailbox.
const ABOUT_POLICY: [&str; 27] = [
    "relay",
    "block",
    "black list",
    "blacklist",
    "denylist",
    "dnsbl",
    "spam",
    "policy",
    "policies",
    "reputation",
    "dkim",
    "dmarc",
    "authenti",
    "throttl",
    "rate limit",
    "too many",
    "limit exceeded",
    "prohibit",
    "not permitted",
    "not allowed to send",
    "access denied",
    "not verified",
    "unsolicited",
    "server busy",
    "sender verify",
    "exception",
    "quota",
];
const ABOUT_POLICY_WORDS: [&str; 5] = ["spf", "rbl", "sender", "limit", "limits"];
/// Words about the recipient, for codes that mean something else with other servers.
const ABOUT_RECIPIENT: [&str; 6] =
    ["recipient address", "mailbox", "no such", "unknown user", "user unknown", "does not exist"];
/// Words of a server in trouble of its own. The trouble may be with one domain only.
const ABOUT_TROUBLE: [&str; 5] = ["server error", "local problem", "local error", "internal error", "system problem"];
/// How greylisting calls itself.
const GREYLISTING: [&str; 4] = ["greylist", "graylist", "grey list", "gray list"];

fn says(text: &str, phrases: &[&str], words: &[&str]) -> bool {
    phrases.iter().any(|phrase| text.contains(phrase))
        || text.split(|letter: char| !letter.is_alphanumeric()).any(|word| words.contains(&word))
}

/// Whose fault the refusal is.
pub fn fault(reply: &Reply) -> Fault {
    // A domain and an address of a page may have any word in their names.
    let words: Vec<_> =
        reply.text.split_whitespace().filter(|word| !word.contains('@') && !word.contains("://")).collect();
    let text = words.join(" ").to_lowercase();
    if !reply.is_about_a_mail() || says(&text, &ABOUT_US, &ABOUT_US_WORDS) {
        return Fault::Relay;
    }
    if reply.code < 500 && says(&text, &GREYLISTING, &[]) {
        return Fault::Mail;
    }
    let is_policy = says(&text, &ABOUT_POLICY, &ABOUT_POLICY_WORDS);
    let is_bare_no = reply.code == 550 && reply.phase == Phase::Recipient;
    match reply.enhanced {
        // A full mailbox is emptied some day, and some say so when the quota is that of the sender. A mail that is too large for
        // the server: all of ours are about as large.
        Some((4 | 5, 2, 2) | (4 | 5, 3, 4)) => Fault::Unclear,
        // No such mailbox, system, syntax, ambiguous, moved, no mail for that domain. Other details are of the sender's address
        // (7, 8), or of a server's own making, such as Exchange's 5.1.90 for a quota.
        // And a mailbox that is disabled (5.2.1), may take no such mail (3), or is a list that cannot be expanded (4). Details above
        // that are Exchange's own, about the sender's rights among others.
        Some((5, 1, 1..=4 | 6 | 10) | (5, 2, 1 | 3 | 4)) if reply.code >= 500 => Fault::Recipient,
        // Exchange Online of a recipient that is not in its directory, Outlook.com of a mailbox that it does not have: as little
        // as a 550 without a code, and only where the words are about the recipient. By RFC 3463 these say that the next server
        // does not answer, and that a command was wrong.
        Some((5, 4, 1)) if is_bare_no && says(&text, &ABOUT_RECIPIENT, &[]) => Fault::PerhapsRecipient,
        Some((5, 5, 0)) if is_bare_no && !is_policy && says(&text, &ABOUT_RECIPIENT, &[]) => Fault::PerhapsRecipient,
        Some((4, ..)) if says(&text, &ABOUT_TROUBLE, &[]) => Fault::Unclear,
        // Greylisting has 4.7.1 as well; Exchange has its own limits from 4.7.500 on.
        Some((4, 7, detail)) if detail < 500 && !is_policy && matches!(reply.code, 450 | 451) => Fault::Mail,
        Some((4 | 5, 1, 7 | 8) | (4 | 5, 3 | 7, _) | (5, 5, _) | (4 | 5, 4, 5)) => Fault::Relay,
        _ if is_policy => Fault::Relay,
        Some((4, 2, _)) => Fault::Mail,
        None => without_code(reply, &text),
        // Anything may be meant by these.
        Some((5, 1 | 2, _)) if reply.code >= 500 => Fault::Unclear,
        // A code that says both "later" and "never" is taken by its milder half.
        Some((class, ..)) if class == 4 || reply.code < 500 => Fault::Mail,
        Some(_) => Fault::Unclear,
    }
}

fn without_code(reply: &Reply, text: &str) -> Fault {
    match reply.code {
        550 if reply.phase == Phase::Recipient => Fault::PerhapsRecipient,
        // No room, a failure that is not about one address, a command or a login that is refused.
        452 | 454 | 500..=504 | 530..=538 => Fault::Relay,
        400..500 if says(text, &ABOUT_TROUBLE, &[]) => Fault::Unclear,
        400..500 => Fault::Mail,
        _ => Fault::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::Phase::{Connect, Data, End, Login, Recipient as Rcpt, Sender, StartTls};
    use super::*;

    #[rstest::rstest]
    // Postfix
    #[case::nobody(
        Rcpt,
        "550 5.1.1 <ann@example.com>: Recipient address rejected: User unknown in relay recipient table",
        Fault::Recipient
    )]
    #[case::nobody_here(Rcpt, "550 5.1.1 <ann@example.com>: user unknown in virtual mailbox table", Fault::Recipient)]
    #[case::no_such_domain(
        Rcpt,
        "550 5.1.2 <ann@nowhere.example>: Recipient address rejected: Domain not found",
        Fault::Recipient
    )]
    #[case::null_mx(
        Rcpt,
        "556 5.1.10 <ann@example.com>: Recipient address rejected: Domain does not accept mail (nullMX)",
        Fault::Recipient
    )]
    #[case::domain_for_now(
        Rcpt,
        "450 4.1.2 <ann@example.com>: Recipient address rejected: Domain not found",
        Fault::Mail
    )]
    #[case::relay_denied(Rcpt, "554 5.7.1 <ann@example.com>: Relay access denied", Fault::Relay)]
    #[case::relay_denied_for_now(Rcpt, "454 4.7.1 <ann@example.com>: Relay access denied", Fault::Relay)]
    #[case::block_list(
        Rcpt,
        "554 5.7.1 Service unavailable; Client host [192.0.2.7] blocked using zen.list.example",
        Fault::Relay
    )]
    #[case::helo_at_once(
        Connect,
        "504 5.5.2 <pod>: Helo command rejected: need fully-qualified hostname",
        Fault::Relay
    )]
    #[case::helo_later(Rcpt, "504 5.5.2 <pod>: Helo command rejected: need fully-qualified hostname", Fault::Relay)]
    #[case::helo_unknown(Rcpt, "450 4.7.1 <pod.example>: Helo command rejected: Host not found", Fault::Relay)]
    #[case::client_name(Rcpt, "450 4.7.25 Client host rejected: cannot find your hostname, [192.0.2.7]", Fault::Relay)]
    #[case::sender(Rcpt, "550 5.1.0 <tickets@example.com>: Sender address rejected: User unknown", Fault::Relay)]
    #[case::sender_domain(
        Rcpt,
        "450 4.1.8 <tickets@example.com>: Sender address rejected: Domain not found",
        Fault::Relay
    )]
    #[case::greylisted(Rcpt, "450 4.2.0 <ann@example.com>: Recipient address rejected: Greylisted", Fault::Mail)]
    #[case::full(Rcpt, "452 4.2.2 <ann@example.com>: mailbox is full", Fault::Unclear)]
    #[case::system_full(Sender, "452 4.3.1 Insufficient system storage", Fault::Relay)]
    #[case::too_large(End, "552 5.3.4 Message size exceeds fixed limit", Fault::Unclear)]
    #[case::queue(End, "451 4.3.0 Error: queue file write error", Fault::Relay)]
    #[case::shuts_down(End, "421 4.3.2 Service shutting down", Fault::Relay)]
    #[case::idle(Sender, "421 4.4.2 Error: timeout exceeded", Fault::Relay)]
    #[case::tls_wanted(Sender, "530 5.7.0 Must issue a STARTTLS command first", Fault::Relay)]
    #[case::tls_for_now(StartTls, "454 4.7.0 TLS not available due to local problem", Fault::Relay)]
    #[case::password(Login, "535 5.7.8 Error: authentication failed: UGFzc3dvcmQ6", Fault::Relay)]
    #[case::content(End, "550 5.7.1 Message content rejected", Fault::Relay)]
    #[case::no_recipients(Data, "554 5.5.1 Error: no valid recipients", Fault::Relay)]
    // Greylisting of others
    #[case::milter(Rcpt, "451 4.7.1 Greylisting in action, please come back in 00:05:00", Fault::Mail)]
    #[case::filter(End, "451 4.7.1 Try again later", Fault::Mail)]
    #[case::bare_later(Rcpt, "451 Temporary failure, please try again later.", Fault::Mail)]
    // Exchange and Office 365
    #[case::exchange_nobody(
        Rcpt,
        "550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup",
        Fault::Recipient
    )]
    #[case::exchange_at_the_end(End, "550 5.1.1 User unknown", Fault::Recipient)]
    #[case::exchange_off(Rcpt, "550 5.2.1 Mailbox cannot be accessed", Fault::Recipient)]
    #[case::exchange_full(End, "554 5.2.2 mailbox full; STOREDRV.Deliver; QuotaExceededException", Fault::Unclear)]
    #[case::exchange_bad_sender(End, "550 5.1.8 Access denied, bad outbound sender", Fault::Relay)]
    #[case::exchange_quota(Sender, "550 5.2.2 Submission quota exceeded", Fault::Relay)]
    #[case::exchange_quota_late(End, "550 5.2.2 STOREDRV; Submission quota exceeded", Fault::Relay)]
    #[case::exchange_rights(
        End,
        "554 5.2.252 SendAsDenied; a@example.com not allowed to send as b@example.com",
        Fault::Relay
    )]
    #[case::exchange_tenant(Rcpt, "550 5.7.64 TenantAttribution; Relay Access Denied", Fault::Relay)]
    #[case::exchange_reputation(
        Rcpt,
        "550 5.7.708 Service unavailable. Access denied, traffic not accepted from this IP",
        Fault::Relay
    )]
    #[case::exchange_edge(Rcpt, "550 5.4.1 Recipient address rejected: Access denied", Fault::PerhapsRecipient)]
    #[case::exchange_edge_later(End, "550 5.4.1 Recipient address rejected: Access denied", Fault::Relay)]
    #[case::outlook_nobody(Rcpt, "550 5.5.0 Requested action not taken: mailbox unavailable", Fault::PerhapsRecipient)]
    #[case::no_answer_from_host(Rcpt, "550 5.4.1 No answer from host", Fault::Unclear)]
    #[case::wrong_command(Rcpt, "550 5.5.0 Requested action not taken", Fault::Relay)]
    #[case::outlook_policy(Rcpt, "550 5.5.0 Requested action not taken: blocked by policy", Fault::Relay)]
    #[case::exchange_spam_quota(
        End,
        "554 5.2.0 STOREDRV.Submission.Exception:OutboundSpamException; Failed to process message; WASCL UserAction verdict is RefuseQuota",
        Fault::Relay
    )]
    #[case::exchange_submission_quota(
        End,
        "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to process message",
        Fault::Relay
    )]
    #[case::exchange_daily(
        Rcpt,
        "550 5.1.90 Your message can't be sent because you've reached your daily limit for message recipients",
        Fault::Relay
    )]
    #[case::spf(
        Rcpt,
        "550 5.1.0 192.0.2.7 is not allowed to send from <example.com> per it's SPF Record",
        Fault::Relay
    )]
    #[case::sender_denied(Rcpt, "554 5.1.0 Sender denied", Fault::Relay)]
    #[case::login_needed(Rcpt, "550 5.1.0 Authentication required", Fault::Relay)]
    #[case::other_address_status(Rcpt, "550 5.1.0 Address rejected", Fault::Unclear)]
    #[case::other_mailbox_status(Rcpt, "550 5.2.0 Requested action not taken", Fault::Unclear)]
    #[case::quota_as_nobody(Rcpt, "550 5.1.1 Daily quota of the account is used up", Fault::Relay)]
    #[case::exchange_front_end(End, "451 4.7.0 Temporary server error. Please try again later. PRX5", Fault::Unclear)]
    #[case::peak_limit(Rcpt, "450 4.2.1 Peak SMTP relay limit exceeded for customer", Fault::Relay)]
    #[case::postgrey(
        Rcpt,
        "450 4.2.0 <ann@example.com>: Recipient address rejected: Greylisted, see http://policy.example/sender.html",
        Fault::Mail
    )]
    #[case::greylisted_sender(Rcpt, "450 4.7.1 Greylisting policy for this sender in effect", Fault::Mail)]
    #[case::page(Rcpt, "550 5.5.0 No such mailbox, see https://relay.example/policy", Fault::PerhapsRecipient)]
    #[case::exchange_loop(End, "554 5.4.14 Hop count exceeded - possible mail loop", Fault::Unclear)]
    #[case::exchange_busy(Rcpt, "451 4.7.500 Server busy. Please try again later", Fault::Relay)]
    #[case::exchange_limited(
        Rcpt,
        "451 4.7.651 The mail server has been temporarily rate limited due to IP reputation",
        Fault::Relay
    )]
    #[case::exchange_threads(End, "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded", Fault::Relay)]
    // Gmail
    #[case::gmail_nobody(Rcpt, "550 5.1.1 The email account that you tried to reach does not exist.", Fault::Recipient)]
    #[case::gmail_off(Rcpt, "550 5.2.1 The email account that you tried to reach is inactive.", Fault::Recipient)]
    #[case::gmail_full(Rcpt, "552 5.2.2 The recipient's inbox is out of storage space.", Fault::Unclear)]
    #[case::gmail_fast(
        Rcpt,
        "450 4.2.1 The user receives mail at a rate that keeps further messages out.",
        Fault::Mail
    )]
    #[case::gmail_spam(
        End,
        "550 5.7.1 Our system has found that this message is likely unsolicited mail.",
        Fault::Relay
    )]
    #[case::gmail_dmarc(End, "550 5.7.26 Unauthenticated email from example.com is not accepted", Fault::Relay)]
    #[case::gmail_rate(End, "421 4.7.28 Unusual rate of mail from your IP address", Fault::Relay)]
    #[case::gmail_daily(End, "550 5.4.5 Daily user sending limit exceeded", Fault::Relay)]
    #[case::gmail_login(Login, "534 5.7.9 Application-specific password required", Fault::Relay)]
    // Amazon SES
    #[case::ses_rate(End, "454 Throttling failure: Maximum sending rate exceeded.", Fault::Relay)]
    #[case::ses_quota(End, "454 Throttling failure: Daily message quota exceeded.", Fault::Relay)]
    #[case::ses_sandbox(End, "554 Message rejected: Email address is not verified.", Fault::Relay)]
    #[case::ses_password(Login, "535 Authentication Credentials Invalid", Fault::Relay)]
    // Exim, which has no enhanced codes unless told to
    #[case::exim_nobody(Rcpt, "550 Unknown user", Fault::PerhapsRecipient)]
    #[case::exim_route(Rcpt, "550 Unrouteable address", Fault::PerhapsRecipient)]
    #[case::exim_domain(Rcpt, "550 <ann@relay-policy.example>: Unknown user", Fault::PerhapsRecipient)]
    #[case::exim_relay(Rcpt, "550 relay not permitted", Fault::Relay)]
    #[case::exim_admin(Rcpt, "550 Administrative prohibition", Fault::Relay)]
    #[case::exim_list(Rcpt, "550 Rejected because 192.0.2.7 is in a black list at list.example", Fault::Relay)]
    #[case::exim_callout(Rcpt, "550 Sender verify failed", Fault::Relay)]
    #[case::exim_helo(Rcpt, "550 Access denied - Invalid HELO name", Fault::Relay)]
    #[case::exim_helo_syntax(Connect, "501 Syntactically invalid HELO argument(s)", Fault::Relay)]
    #[case::exim_space(Rcpt, "452 space shortage, please try later", Fault::Relay)]
    #[case::exim_local(Rcpt, "451 Temporary local problem - please try later", Fault::Unclear)]
    #[case::exim_busy(Connect, "421 too many concurrent SMTP connections; please try again later", Fault::Relay)]
    #[case::bare_at_the_end(End, "550 no", Fault::Unclear)]
    #[case::other_relay(Rcpt, "551 User not local", Fault::Unclear)]
    #[case::other_name(Rcpt, "553 mailbox name not allowed", Fault::Unclear)]
    fn is_found(#[case] phase: Phase, #[case] reply: &str, #[case] expected: Fault) {
        let (code, text) = reply.split_once(' ').unwrap();
        assert_eq!(fault(&Reply::new(phase, code.parse().unwrap(), text)), expected);
    }

    /// Whatever a server says, only 5.1.x and 5.2.x make a dead letter at once, and only where it is about a recipient.
    #[test]
    fn nothing_else_is_the_recipients_fault() {
        for phase in [Connect, StartTls, Login, Sender, Rcpt, Data, End] {
            for code in 400..600 {
                for class in [4, 5] {
                    for (subject, detail) in (0..=8).flat_map(|subject| (0..30).map(move |detail| (subject, detail))) {
                        let found = fault(&Reply::new(phase, code, &format!("{class}.{subject}.{detail} no")));
                        let is_theirs = class == 5
                            && phase >= Rcpt
                            && code >= 500
                            && matches!((subject, detail), (1, 1 | 2 | 3 | 4 | 6 | 10) | (2, 1 | 3 | 4));
                        assert_eq!(found == Fault::Recipient, is_theirs, "{phase} {code} {class}.{subject}.{detail}");
                        assert_ne!(found, Fault::PerhapsRecipient, "only the words could tell");
                    }
                }
                let bare = fault(&Reply::new(phase, code, "no"));
                assert_ne!(bare, Fault::Recipient);
                assert_eq!(bare == Fault::PerhapsRecipient, phase == Rcpt && code == 550);
            }
        }
    }

    #[test]
    fn a_reply_is_shown_without_addresses_and_not_endlessly() {
        let reply = Reply::new(Rcpt, 550, "5.1.1 <ann@example.com>:\r\n nobody");
        assert_eq!(
            (reply.enhanced, reply.to_string()),
            (Some((5, 1, 1)), "at RCPT TO: 550 5.1.1 <a…@example.com>: nobody".into())
        );
        assert_eq!(Reply::new(Rcpt, 550, &"x".repeat(9_000)).text.len(), MAX_TEXT);
        let reply = Reply::new(Rcpt, 550, "5.1.1 no\0body \u{1b}[31mhere\u{7}");
        assert_eq!((reply.enhanced, &*reply.text), (Some((5, 1, 1)), "5.1.1 no body [31mhere"));
    }
}
