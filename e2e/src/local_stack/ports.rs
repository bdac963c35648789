//! Which port each process has: in a row, from the first one on.

use super::LocalStackError;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// What has a port here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The gateway.
    Gateway,
    /// The catalog.
    Catalog,
    /// Booking.
    Booking,
    /// Payment.
    Payment,
    /// Notification.
    Notification,
    /// The provider simulator's admin interface.
    Providers,
    /// The provider shaped as Stripe.
    Stripe,
    /// The provider shaped as PayPal.
    Paypal,
    /// The mail sink's admin interface.
    Mails,
    /// SMTP of the mail sink.
    Smtp,
    /// PostgreSQL.
    Postgres,
    /// The port for the operator of the gateway.
    GatewayAdmin,
    /// The same of the catalog.
    CatalogAdmin,
    /// The same of booking.
    BookingAdmin,
    /// The same of payment.
    PaymentAdmin,
    /// The same of notification.
    NotificationAdmin,
}

/// How many ports there are.
pub const COUNT: u16 = 16;

const NAMES: [(Port, &str); COUNT as usize] = [
    (Port::Gateway, "the gateway"),
    (Port::Catalog, "the catalog"),
    (Port::Booking, "booking"),
    (Port::Payment, "payment"),
    (Port::Notification, "notification"),
    (Port::Providers, "the provider simulator"),
    (Port::Stripe, "the provider shaped as Stripe"),
    (Port::Paypal, "the provider shaped as PayPal"),
    (Port::Mails, "the mail sink"),
    (Port::Smtp, "SMTP"),
    (Port::Postgres, "PostgreSQL"),
    (Port::GatewayAdmin, "the gateway's admin interface"),
    (Port::CatalogAdmin, "the catalog's admin interface"),
    (Port::BookingAdmin, "booking's admin interface"),
    (Port::PaymentAdmin, "payment's admin interface"),
    (Port::NotificationAdmin, "notification's admin interface"),
];

/// The ports of one local stack.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    first: u16,
}

impl Ports {
    /// Those from `first` on, if all of them are free.
    pub fn from(first: u16) -> Result<Self, LocalStackError> {
        for (port, (_, what)) in (first..=u16::MAX).zip(NAMES) {
            TcpListener::bind(("127.0.0.1", port)).map_err(|_| LocalStackError::Port { port, what })?;
        }
        Ok(Self { first })
    }

    /// The port of one.
    pub fn of(self, wanted: Port) -> u16 {
        let nth = (0..).zip(NAMES).find_map(|(nth, (port, _))| (port == wanted).then_some(nth));
        self.first.saturating_add(nth.unwrap_or(0))
    }

    /// Where one is.
    pub fn url(self, of: Port) -> String {
        format!("http://127.0.0.1:{}", self.of(of))
    }

    /// The first of as many free ports in a row as are needed. No two callers in this process get the same.
    pub fn any_free() -> Option<u16> {
        static HANDED_OUT: AtomicU16 = AtomicU16::new(0);
        let free = |first: u16| (first..first + COUNT).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok());
        // Below what the kernel gives to clients.
        let begin = 12_000 + u16::try_from(std::process::id() % 500).unwrap_or(0) * COUNT;
        loop {
            let nth = HANDED_OUT.fetch_add(1, Ordering::Relaxed);
            let first = begin.checked_add(nth.checked_mul(COUNT)?).filter(|first| *first < 32_000)?;
            if free(first) {
                return Some(first);
            }
        }
    }
}
