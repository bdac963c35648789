//! What to do next for a payment, by what is written down: pure, so that a model checker can go through all of it
//! (`model_tests.rs`).
//!
//! The rules: money moves only in a confirmation, and a confirmation is written down before it leaves. One that has no
//! definite answer is in doubt, and then nobody else is asked until a read by the provider's own id, or a cancellation,
//! settles it. A definite "not charged" starts a new attempt with the next number, and so with new keys.

use std::time::Duration;

/// Providers, in the order in which they are asked.
pub const PROVIDERS: usize = 2;
/// How long a provider keeps the idempotency keys of the one-step protocol for certain: Stripe removes them after 24 h, and then
/// the same key is a new charge.
pub const KEYS_LAST: Duration = Duration::from_secs(23 * 3_600);

/// How an attempt with one provider stands, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The provider is asked for an object to confirm. That moves no money.
    Creating,
    /// The object is there, and nobody has confirmed it.
    Created {
        object: String,
    },
    /// A confirmation was or is about to be sent: the provider may have charged.
    Confirming {
        object: String,
    },
    /// The buyer has to do something first, such as 3-D Secure.
    NeedsBuyer {
        object: String,
    },
    Charged {
        object: String,
    },
    /// It has not charged, and no request that is under way can make it.
    NotCharged,
    /// It will not charge.
    Declined,
    /// The buyer did not act in time; the object can charge no more.
    Expired,
    /// It does not take this order, such as one with an amount that it does not allow.
    Refused,
    /// The one-step protocol of version 0.1: it was asked with the order's own key, and charge outcome unknown.
    Begun,
}

impl State {
    /// Whether the provider may have charged, or still may.
    pub fn in_doubt(&self) -> bool {
        matches!(self, Self::Confirming { .. } | Self::Begun)
    }

    /// The provider's own id of what the attempt is about.
    pub fn object(&self) -> Option<&str> {
        match self {
            Self::Created { object }
            | Self::Confirming { object }
            | Self::NeedsBuyer { object }
            | Self::Charged { object } => Some(object),
            _ => None,
        }
    }
}

/// The last attempt with a provider.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// From 1; part of its idempotency keys.
    pub number: i32,
    pub state: State,
    /// How long it has been in this state.
    pub age: Duration,
}

/// What this request has learnt of a provider that is not written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Progress {
    #[default]
    Nothing,
    /// It was read, and is not confirmed yet.
    Unconfirmed,
    /// It gave no definite answer: this request asks it no more.
    Open,
    /// It was asked by this request and has not charged.
    Spent,
}

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// To have the order paid.
    Pay,
    /// To have it never paid, unless it is already.
    Close,
    /// To see how it stands, and change nothing at a provider.
    Look,
}

/// What a decision is made by.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    pub attempts: &'a [Option<Attempt>; PROVIDERS],
    pub progress: &'a [Progress; PROVIDERS],
    /// Which providers may be asked for money.
    pub may_ask: [bool; PROVIDERS],
    /// Which providers can cancel an object.
    pub cancels: [bool; PROVIDERS],
    pub purpose: Purpose,
    /// How long a buyer has to act.
    pub buyer_limit: Duration,
}

/// The next step. Everything that it names is at the provider of that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Next {
    /// It is paid.
    Paid(usize),
    /// Write down `Creating` under that number, then ask for an object.
    Create(usize, i32),
    /// Write down `Confirming` under that number, then confirm the object.
    Confirm(usize, i32),
    /// Confirm again with the same key, in doubt; nothing new to write down.
    ConfirmAgain(usize),
    /// Read the object by its id.
    Read(usize),
    /// Cancel the object: once it is cancelled, a confirmation that comes late charges nothing.
    Cancel(usize),
    /// Write down `Expired`: nothing is under way, and the object is never confirmed.
    Expire(usize),
    /// One-step protocol: search for a charge with the order's key. That there is none says nothing.
    Search(usize),
    /// One-step protocol: ask with the order's own key again.
    ChargeAgain(usize),
    /// It waits for the buyer.
    AwaitBuyer(usize),
    /// Somebody may have charged, and no more can be found out now.
    Wait,
    /// Nobody has charged, nobody will by itself, and nobody else may be asked now.
    Exhausted,
}

/// What a provider made of a request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// The object to confirm is there.
    Created {
        object: String,
    },
    Charged {
        object: String,
    },
    /// It is not confirmed; of a search: there is none.
    Unconfirmed,
    /// It is being charged.
    Processing,
    NeedsBuyer {
        object: String,
    },
    Declined,
    /// It is cancelled.
    Cancelled,
    /// The request itself is wrong: the answer to this order alone.
    Refused,
    /// Nothing was done: no connection, an open circuit, too many requests, a key that is not taken.
    NotReached,
    /// No answer, or none that says yes or no.
    Unanswered,
}

/// Decides the next step.
pub fn next(facts: &Facts<'_>) -> Next {
    let attempts = || facts.attempts.iter().enumerate().filter_map(|(index, one)| Some((index, one.as_ref()?)));
    if let Some((index, _)) = attempts().find(|(_, one)| matches!(one.state, State::Charged { .. })) {
        return Next::Paid(index);
    }
    if let Some((index, attempt)) = attempts().find(|(_, one)| one.state.in_doubt()) {
        return resolve(facts, index, attempt);
    }
    if let Some((index, attempt)) = attempts().find(|(_, one)| matches!(one.state, State::NeedsBuyer { .. })) {
        return await_buyer(facts, index, attempt);
    }
    // A buyer who did not act is not charged elsewhere behind their back.
    let over = attempts().any(|(_, one)| one.state == State::Expired);
    if over || facts.purpose != Purpose::Pay {
        return Next::Exhausted;
    }
    let free = |index: &usize| facts.may_ask[*index] && facts.progress[*index] != Progress::Spent;
    let begin = |index: usize| match &facts.attempts[index] {
        None => Some(Next::Create(index, 1)),
        Some(Attempt { number, state: State::Created { .. }, .. }) => Some(Next::Confirm(index, *number)),
        // Of an object whose id nobody knows, no confirmation can have been sent.
        Some(Attempt { number, state: State::NotCharged | State::Creating, .. }) => {
            Some(Next::Create(index, number.saturating_add(1)))
        }
        Some(_) => None,
    };
    (0..PROVIDERS).filter(free).find_map(begin).unwrap_or(Next::Exhausted)
}

/// Finds out whether an attempt in doubt has charged.
fn resolve(facts: &Facts<'_>, index: usize, attempt: &Attempt) -> Next {
    let two_steps = attempt.state != State::Begun;
    match facts.progress[index] {
        Progress::Nothing => {
            if two_steps {
                Next::Read(index)
            } else {
                Next::Search(index)
            }
        }
        Progress::Unconfirmed if facts.purpose == Purpose::Look => Next::Wait,
        Progress::Unconfirmed if two_steps && facts.cancels[index] => Next::Cancel(index),
        Progress::Unconfirmed if facts.may_ask[index] && two_steps => Next::ConfirmAgain(index),
        Progress::Unconfirmed if facts.may_ask[index] && attempt.age < KEYS_LAST => Next::ChargeAgain(index),
        _ => Next::Wait,
    }
}

fn await_buyer(facts: &Facts<'_>, index: usize, attempt: &Attempt) -> Next {
    let over = attempt.age >= facts.buyer_limit || facts.purpose == Purpose::Close;
    match facts.progress[index] {
        Progress::Nothing => Next::Read(index),
        _ if over && facts.purpose != Purpose::Look => {
            if facts.cancels[index] && facts.progress[index] != Progress::Spent {
                Next::Cancel(index)
            } else if facts.cancels[index] {
                Next::Wait
            } else {
                Next::Expire(index)
            }
        }
        // The buyer has acted, and it is for this side to confirm: under a new number, for the answer to the old key stays.
        Progress::Unconfirmed if facts.may_ask[index] && facts.purpose == Purpose::Pay => {
            Next::Confirm(index, attempt.number.saturating_add(1))
        }
        _ => Next::AwaitBuyer(index),
    }
}

/// What an answer means: the state to write down, if it is another one, and what this request knows then. `cancels`: whether
/// the provider can cancel an object.
pub fn learn(step: Next, state: &State, answer: &Answer, cancels: bool) -> (Option<State>, Progress) {
    let open = (None, Progress::Open);
    let not_charged = (Some(State::NotCharged), Progress::Spent);
    let known = |state| (Some(state), Progress::Nothing);
    match (step, answer) {
        (_, Answer::Charged { object }) => known(State::Charged { object: object.clone() }),
        (Next::Create(..), Answer::Created { object }) => known(State::Created { object: object.clone() }),
        (Next::Create(..) | Next::Confirm(..) | Next::ConfirmAgain(_) | Next::ChargeAgain(_), Answer::Refused) => {
            (Some(State::Refused), Progress::Spent)
        }
        // Without an id nobody can have confirmed it, and what never arrived did nothing.
        (Next::Create(..), _) | (Next::Confirm(..), Answer::NotReached) => not_charged,
        (Next::Confirm(..) | Next::ConfirmAgain(_) | Next::ChargeAgain(_) | Next::Read(_), Answer::Declined) => {
            (Some(State::Declined), Progress::Spent)
        }
        (_, Answer::NeedsBuyer { object }) => match state {
            State::NeedsBuyer { .. } => open,
            // The confirmation may still arrive, after the buyer has acted: its own answer is needed first.
            State::Confirming { .. } if !cancels && matches!(step, Next::Read(_)) => (None, Progress::Unconfirmed),
            _ => (Some(State::NeedsBuyer { object: object.clone() }), Progress::Open),
        },
        // It is read next.
        (Next::Confirm(..), Answer::Unanswered | Answer::Unconfirmed) => (None, Progress::Nothing),
        (Next::Read(_) | Next::Search(_), Answer::Unconfirmed) => (None, Progress::Unconfirmed),
        (Next::Read(_) | Next::Cancel(_), Answer::Cancelled) => match state {
            State::NeedsBuyer { .. } => (Some(State::Expired), Progress::Spent),
            _ => not_charged,
        },
        // A cancellation that was refused: not even the buyer's time being over helps now.
        (Next::Cancel(_), _) if matches!(state, State::NeedsBuyer { .. }) => (None, Progress::Spent),
        _ => open,
    }
}
