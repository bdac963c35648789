//! What the mails say: one for each turn of an order, with what the buyer can do next.

use super::outbox::{Kind, Message};
use crate::cancel_reason::CancelReason;
use std::fmt::Write;

/// What a mail about something that came to nothing says.
struct Ending {
    subject: &'static str,
    /// After "Hello …".
    what: &'static str,
    next: &'static str,
}

/// Letters of a line.
const LINE: usize = 72;

const BOOK_AGAIN: &str = "If you still want to go, please book again while there are seats left.";

fn ending(reason: CancelReason) -> Ending {
    let (subject, what, next) = match reason {
        CancelReason::Declined => (
            "Your payment for {event} was declined",
            "your payment was declined, so your booking is cancelled. You pay nothing; should something have been charged all the \
             same, it is refunded.",
            "The seats are free again. If you still want to go, please book again with another way to pay while there are seats \
             left.",
        ),
        CancelReason::Expired => (
            "Your reservation for {event} is over",
            "your reservation was not bought in time, so it is over. You pay nothing.",
            BOOK_AGAIN,
        ),
        CancelReason::GivenBack => (
            "Your reservation for {event} is cancelled",
            "your reservation is cancelled, as you asked. You pay nothing.",
            BOOK_AGAIN,
        ),
        CancelReason::PaymentTimedOut => (
            "Your booking for {event} is cancelled",
            "your payment did not come to an end in time, so your booking is cancelled. You pay nothing; should something have \
             been charged all the same, it is refunded.",
            BOOK_AGAIN,
        ),
        CancelReason::PaymentUnavailable => (
            "Your booking for {event} is cancelled",
            "your payment could not be taken, so your booking is cancelled. Nothing was charged.",
            BOOK_AGAIN,
        ),
        CancelReason::Other => (
            "Your booking for {event} is cancelled",
            "your booking is cancelled. What was charged for it is refunded.",
            "If you did not expect this, please ask us, and name the booking above.",
        ),
    };
    Ending { subject, what, next }
}

fn of(message: &Message) -> Ending {
    ending(CancelReason::read(message.cancel_reason.as_deref()))
}

pub fn subject(message: &Message) -> String {
    let subject = match message.kind {
        Kind::BookingConfirmed => "Your booking for {event}",
        Kind::Ticket if message.seats == 1 => "Your ticket for {event}",
        Kind::Ticket => "Your tickets for {event}",
        Kind::PaymentPending => "Your payment for {event} is open",
        Kind::ConfirmPayment => "Please confirm your payment for {event}",
        Kind::BookingCancelled => of(message).subject,
    };
    subject.replace("{event}", &one_line(&message.event))
}

/// Plain text.
pub fn body(message: &Message, with_tickets: bool) -> String {
    let Message { booking, user, seats, amount_cents, event, starts_at, .. } = message;
    let are_several = *seats != 1;
    let (what, amount, next) = match message.kind {
        Kind::BookingConfirmed | Kind::Ticket => {
            let next = match (with_tickets, are_several) {
                (true, true) => {
                    "Your tickets are attached, one page for each seat. Show their codes at the entrance: each lets one person in."
                }
                (true, false) => "Your ticket is attached. Show its code at the entrance.",
                (false, true) => "Your tickets follow in another mail.",
                (false, false) => "Your ticket follows in another mail.",
            };
            ("your booking is confirmed.", "Paid    ", next)
        }
        Kind::ConfirmPayment => (
            "we keep your seats, and your payment waits for you: please confirm it with your bank or provider. Otherwise the seats \
             are given to others.",
            "To pay  ",
            "This is not a ticket. We write again as soon as the payment is settled; please do not book a second time.",
        ),
        Kind::PaymentPending => (
            "we keep your seats, and your payment is still open: we wait for the provider's answer. If your bank or provider asks you \
             to confirm it, please do: otherwise the seats are given to others.",
            "To pay  ",
            "This is not a ticket. We write again as soon as the payment is settled; please do not book a second time.",
        ),
        Kind::BookingCancelled => {
            let Ending { what, next, .. } = of(message);
            (what, "Not paid", next)
        }
    };
    let mut text = format!("Hello {},\n\n{}\n\n", one_line(user), wrapped(what));
    let _ = writeln!(text, "  Event    {}", one_line(event));
    if let Some(starts_at) = starts_at {
        let _ = writeln!(text, "  Starts   {starts_at}");
    }
    let _ = writeln!(text, "  Seats    {seats}");
    // What was paid for a booking that was cancelled by hand, nobody knows here.
    let knows = message.kind != Kind::BookingCancelled
        || CancelReason::read(message.cancel_reason.as_deref()) != CancelReason::Other;
    if *amount_cents > 0 && knows {
        let _ = writeln!(text, "  {amount} {}.{:02} EUR", amount_cents / 100, amount_cents % 100);
    }
    let _ = writeln!(text, "  Booking  {booking}\n\n{}", wrapped(next));
    text
}

/// In lines that a mail need not encode.
fn wrapped(paragraph: &str) -> String {
    let (mut text, mut line) = (String::with_capacity(paragraph.len()), 0);
    for word in paragraph.split(' ') {
        if line > 0 && line + 1 + word.len() > LINE {
            text.push('\n');
            line = 0;
        } else if line > 0 {
            text.push(' ');
            line += 1;
        }
        text.push_str(word);
        line += word.len();
    }
    text
}

fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: Kind, reason: Option<&str>) -> Message {
        Message { cancel_reason: reason.map(str::to_owned), ..Message::example(kind, "Opening Night") }
    }

    fn whole(message: &Message, with_tickets: bool) -> String {
        format!("{}\n\n{}", subject(message), body(message, with_tickets))
    }

    /// Subject, words, amount and what to do next.
    fn golden(subject: &str, what: &str, amount: &str, next: &str) -> String {
        format!(
            "{subject}\n\nHello ann,\n\n{what}\n\n  Event    Opening Night\n  Starts   2027-06-18 19:30 UTC\n  Seats    2\n{amount}\
             \x20 Booking  33333333-3333-4333-8333-333333333333\n\n{next}\n"
        )
    }

    const PENDING_NEXT: &str = "This is not a ticket. We write again as soon as the payment is settled;\n\
         please do not book a second time.";
    const AGAIN: &str = "If you still want to go, please book again while there are seats left.";

    #[rstest::rstest]
    #[case::confirmed(Kind::BookingConfirmed, None, true, &golden(
        "Your booking for Opening Night", "your booking is confirmed.", "  Paid     90.00 EUR\n",
        "Your tickets are attached, one page for each seat. Show their codes at\n\
         the entrance: each lets one person in."))]
    #[case::confirmed_without_a_ticket(Kind::BookingConfirmed, None, false, &golden(
        "Your booking for Opening Night", "your booking is confirmed.", "  Paid     90.00 EUR\n",
        "Your tickets follow in another mail."))]
    #[case::ticket(Kind::Ticket, None, true, &golden(
        "Your tickets for Opening Night", "your booking is confirmed.", "  Paid     90.00 EUR\n",
        "Your tickets are attached, one page for each seat. Show their codes at\n\
         the entrance: each lets one person in."))]
    #[case::pending(Kind::PaymentPending, None, false, &golden(
        "Your payment for Opening Night is open",
        "we keep your seats, and your payment is still open: we wait for the\n\
         provider's answer. If your bank or provider asks you to confirm it,\n\
         please do: otherwise the seats are given to others.",
        "  To pay   90.00 EUR\n", PENDING_NEXT))]
    #[case::declined(Kind::BookingCancelled, Some("declined"), false, &golden(
        "Your payment for Opening Night was declined",
        "your payment was declined, so your booking is cancelled. You pay\n\
         nothing; should something have been charged all the same, it is\nrefunded.",
        "  Not paid 90.00 EUR\n",
        "The seats are free again. If you still want to go, please book again\n\
         with another way to pay while there are seats left."))]
    #[case::expired(Kind::BookingCancelled, Some("expired"), false, &golden(
        "Your reservation for Opening Night is over",
        "your reservation was not bought in time, so it is over. You pay nothing.", "  Not paid 90.00 EUR\n", AGAIN))]
    #[case::given_back(Kind::BookingCancelled, Some("given back"), false, &golden(
        "Your reservation for Opening Night is cancelled",
        "your reservation is cancelled, as you asked. You pay nothing.", "  Not paid 90.00 EUR\n", AGAIN))]
    #[case::timed_out(Kind::BookingCancelled, Some("payment timed out"), false, &golden(
        "Your booking for Opening Night is cancelled",
        "your payment did not come to an end in time, so your booking is\n\
         cancelled. You pay nothing; should something have been charged all the\nsame, it is refunded.",
        "  Not paid 90.00 EUR\n", AGAIN))]
    #[case::unavailable(Kind::BookingCancelled, Some("payment unavailable"), false, &golden(
        "Your booking for Opening Night is cancelled",
        "your payment could not be taken, so your booking is cancelled. Nothing\nwas charged.", "  Not paid 90.00 EUR\n", AGAIN))]
    #[case::by_hand(Kind::BookingCancelled, Some("the hall burned down"), false, &golden(
        "Your booking for Opening Night is cancelled",
        "your booking is cancelled. What was charged for it is refunded.", "",
        "If you did not expect this, please ask us, and name the booking above."))]
    fn what_a_buyer_reads(
        #[case] kind: Kind,
        #[case] reason: Option<&str>,
        #[case] with_tickets: bool,
        #[case] expected: &str,
    ) {
        assert_eq!(whole(&message(kind, reason), with_tickets), expected);
    }

    #[test]
    fn a_buyer_who_has_to_act_is_told_to() {
        let message = message(Kind::ConfirmPayment, None);
        let expected = golden(
            "Please confirm your payment for Opening Night",
            "we keep your seats, and your payment waits for you: please confirm it\n\
         with your bank or provider. Otherwise the seats are given to others.",
            "  To pay   90.00 EUR\n",
            PENDING_NEXT,
        );
        assert_eq!(whole(&message, false), expected);
    }

    #[test]
    fn one_seat_has_one_ticket() {
        let message = Message { seats: 1, amount_cents: 0, ..message(Kind::Ticket, None) };
        let text = whole(&message, true);
        assert!(text.starts_with("Your ticket for Opening Night\n"), "{text}");
        assert!(text.ends_with("Your ticket is attached. Show its code at the entrance.\n"), "{text}");
        assert!(!text.contains("EUR"), "nothing was to be paid");
    }

    /// A name or an event with line breaks adds no lines.
    #[test]
    fn names_stay_on_their_line() {
        let message =
            Message { user: "ann\nBcc: x".into(), event: "One\r\nTwo".into(), ..message(Kind::BookingConfirmed, None) };
        assert_eq!(subject(&message), "Your booking for One  Two");
        assert!(body(&message, true).starts_with("Hello ann Bcc: x,\n"));
    }
}
