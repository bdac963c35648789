//! Why a booking came to nothing: in the words of the database, of the API and of the mail.

/// Why a booking is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReason {
    /// No provider takes the payment.
    Declined,
    /// The reservation ran out.
    Expired,
    /// The buyer gave the reservation back.
    GivenBack,
    /// The payment did not come to an end, and was given up.
    PaymentTimedOut,
    /// Nobody could be asked for a payment.
    PaymentUnavailable,
    /// Cancelled by hand, or by a version that gives other reasons.
    Other,
}

impl CancelReason {
    pub const ALL: [Self; 6] =
        [Self::Declined, Self::Expired, Self::GivenBack, Self::PaymentTimedOut, Self::PaymentUnavailable, Self::Other];

    /// Its name in the column `cancel_reason`, and in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Declined => "declined",
            Self::Expired => "expired",
            Self::GivenBack => "given back",
            Self::PaymentTimedOut => "payment timed out",
            Self::PaymentUnavailable => "payment unavailable",
            Self::Other => "cancelled",
        }
    }

    /// Reads what is in the column.
    pub fn read(name: Option<&str>) -> Self {
        Self::ALL.into_iter().find(|reason| name == Some(reason.name())).unwrap_or(Self::Other)
    }

    /// What the buyer reads in the API.
    pub fn message(self) -> &'static str {
        match self {
            Self::Declined => {
                "The payment was declined. You pay nothing, and the seats are free again. Book again with another way to pay."
            }
            Self::Expired => {
                "The reservation was not bought in time. You pay nothing, and the seats are free again. Book again if there are \
                 seats left."
            }
            Self::GivenBack => "The reservation was given back. You pay nothing, and the seats are free again.",
            Self::PaymentTimedOut => {
                "The payment did not come to an end in time. Should something have been charged all the same, it is refunded. The \
                 seats are free again; book again if there are any left."
            }
            Self::PaymentUnavailable => {
                "The payment could not be taken just then, and nothing was charged. Please book again."
            }
            Self::Other => "The booking is cancelled. What was charged for it is refunded.",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_one_name_and_its_own_words() {
        for reason in CancelReason::ALL {
            assert_eq!(CancelReason::read(Some(reason.name())), reason);
        }
        assert_eq!(CancelReason::read(Some("by hand")), CancelReason::Other);
        assert_eq!(CancelReason::read(None), CancelReason::Other);
        let words: std::collections::BTreeSet<_> = CancelReason::ALL.iter().map(|reason| reason.message()).collect();
        assert_eq!(words.len(), CancelReason::ALL.len());
    }
}
