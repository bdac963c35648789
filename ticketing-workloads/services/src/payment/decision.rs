//! What to do next for a payment, by what is written down: pure, so that a model checker can go through all of it
//! (`model_tests.rs`).
//!
//! The rules: money moves only in a confirmation, and a confirmation is written down before it leaves. One that has no
//! definite answer is in doubt, and then nobody else is asked until a read by the provider's own id, or a cancellation,
//! settles it. A definite "not charged" starts a new attempt with the next number, and so with new keys. A request to close
//! a payment reads and cancels; it never asks for money.

use std::time::Duration;

/// Providers, in the order in which they are asked.
pub const PROVIDERS: usize = 2;
/// How long a confirmation in doubt is repeated with its own key, which can only repeat its answer; afterwards with the next
/// number, for an object can be charged once, whatever the key.
pub const SAME_KEY: Duration = Duration::from_secs(60);
/// How long after the last confirmation an object that the provider no longer has can charge no more. Before that, it may be
/// another account's key that does not find it.
pub const GONE_AFTER: Duration = Duration::from_secs(6 * 3_600);
/// How long an object that nobody has confirmed may still be confirmed, at a provider that removes those: PayPal keeps an order
/// for three hours. To make a new one costs nothing.
pub const UNCONFIRMED_LASTS: Duration = Duration::from_secs(3_600);
/// How long after the last request of the one-step protocol its charge is found, if there is one: nothing is on its way for as
/// long as that, and no search lags that far behind.
pub const FOUND_AFTER: Duration = Duration::from_secs(24 * 3_600);

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
        /// An earlier one, with another key, has no answer yet: the answer to this one does not settle that one.
        again: bool,
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
            | Self::Confirming { object, .. }
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
    /// How long it has been in this state; for how long the buyer has been waited for; or how old the keys of the one-step
    /// protocol are.
    pub age: Duration,
    /// How long ago it was written down last, which is before each request that may charge.
    pub idle: Duration,
}

impl Attempt {
    /// One that begins to be in this state.
    pub fn now(number: i32, state: State) -> Self {
        Self { number, state, age: Duration::ZERO, idle: Duration::ZERO }
    }
}

/// What this request has learnt of a provider that is not written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Progress {
    #[default]
    Nothing,
    /// It was read, and is not confirmed yet.
    Unconfirmed,
    /// It has declined, and its object is cancelled before that is written down: somebody could still confirm it.
    Declined,
    /// It has refused to confirm its object, which is cancelled before that is written down: it may not have been the
    /// provider that answered, and then the request may still arrive.
    Refused,
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

/// What holds for every request.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Whether money may be asked for at all.
    pub may_charge: bool,
    /// Which providers may be asked for a payment that is not begun with them.
    pub may_begin: [bool; PROVIDERS],
    /// Which providers can cancel an object.
    pub cancels: [bool; PROVIDERS],
    /// How long each keeps the keys of the one-step protocol for certain: later, the same key is a new charge.
    pub keys_last: [Duration; PROVIDERS],
    /// How long a buyer has to act.
    pub buyer_limit: Duration,
}

/// A request that is worked on: what it has read, written and learnt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Work {
    pub purpose: Purpose,
    pub attempts: [Option<Attempt>; PROVIDERS],
    pub progress: [Progress; PROVIDERS],
}

/// What it means that nobody has charged and nobody else may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unpaid {
    /// Nobody will take it.
    Declined,
    /// It is closed.
    Closed,
    /// It may be asked for again.
    Open,
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
    /// Write down `Expired`: nothing is under way, and nobody confirms it any more.
    Expire(usize),
    /// One-step protocol: search for a charge with the order's key. That there is none says nothing.
    Search(usize),
    /// One-step protocol: write down that it is asked, then ask with the order's own key again.
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
    /// The provider has no such object.
    Gone,
    /// The request itself is wrong: the answer to this order alone.
    Refused,
    /// Nothing was done: no connection, an open circuit, too many requests, a key that is not taken.
    NotReached,
    /// No answer, or none that says yes or no.
    Unanswered,
}

impl Next {
    /// The provider, of a step that is sent to one.
    pub fn sent_to(self) -> Option<usize> {
        match self {
            Self::Create(index, _)
            | Self::Confirm(index, _)
            | Self::ConfirmAgain(index)
            | Self::Read(index)
            | Self::Cancel(index)
            | Self::Search(index)
            | Self::ChargeAgain(index) => Some(index),
            Self::Paid(_) | Self::Expire(_) | Self::AwaitBuyer(_) | Self::Wait | Self::Exhausted => None,
        }
    }
}

impl Work {
    pub fn new(purpose: Purpose, attempts: [Option<Attempt>; PROVIDERS]) -> Self {
        Self { purpose, attempts, progress: Default::default() }
    }

    /// The number of the attempt with this provider.
    pub fn number(&self, index: usize) -> i32 {
        self.attempts[index].as_ref().map_or(1, |attempt| attempt.number)
    }

    /// The object that the attempt with this provider is about.
    pub fn object(&self, index: usize) -> String {
        let object = self.attempts[index].as_ref().and_then(|attempt| attempt.state.object());
        object.unwrap_or_default().to_owned()
    }

    fn begun(&self) -> impl Iterator<Item = (usize, &Attempt)> {
        self.attempts.iter().enumerate().filter_map(|(index, one)| Some((index, one.as_ref()?)))
    }

    /// Decides the next step.
    pub fn next(&self, rules: &Rules) -> Next {
        if let Some((index, _)) = self.begun().find(|(_, one)| matches!(one.state, State::Charged { .. })) {
            return Next::Paid(index);
        }
        let in_doubt: Vec<_> = self.begun().filter(|(_, one)| one.state.in_doubt()).collect();
        if !in_doubt.is_empty() {
            // Of two in doubt, each may be the one that has charged: version 0.1 leaves such.
            let alone = in_doubt.len() == 1;
            let steps = in_doubt.into_iter().map(|(index, attempt)| self.resolve(rules, index, attempt, alone));
            return steps.into_iter().find(|step| *step != Next::Wait).unwrap_or(Next::Wait);
        }
        if let Some((index, attempt)) = self.begun().find(|(_, one)| matches!(one.state, State::NeedsBuyer { .. })) {
            return self.await_buyer(rules, index, attempt);
        }
        // A buyer who did not act is not charged elsewhere behind their back.
        let over = self.begun().any(|(_, one)| one.state == State::Expired);
        if over || self.purpose != Purpose::Pay || !rules.may_charge {
            return Next::Exhausted;
        }
        let free = |index: &usize| rules.may_begin[*index] && self.progress[*index] != Progress::Spent;
        let begin = |index: usize| match &self.attempts[index] {
            None => Some(Next::Create(index, 1)),
            Some(Attempt { number, state: State::Created { .. }, age, .. })
                if rules.cancels[index] || *age < UNCONFIRMED_LASTS =>
            {
                Some(Next::Confirm(index, *number))
            }
            // Of an object whose id nobody knows, or that is not written down as confirmed, no confirmation was sent.
            Some(Attempt { number, state: State::NotCharged | State::Creating | State::Created { .. }, .. }) => {
                Some(Next::Create(index, number.saturating_add(1)))
            }
            Some(_) => None,
        };
        (0..PROVIDERS).filter(free).find_map(begin).unwrap_or(Next::Exhausted)
    }

    /// Finds out whether an attempt in doubt has charged. `alone`: no other one is in doubt.
    fn resolve(&self, rules: &Rules, index: usize, attempt: &Attempt, alone: bool) -> Next {
        let two_steps = attempt.state != State::Begun;
        let may_charge = alone && rules.may_charge && self.purpose == Purpose::Pay;
        match self.progress[index] {
            Progress::Nothing if two_steps => Next::Read(index),
            Progress::Nothing => Next::Search(index),
            _ if self.purpose == Purpose::Look => Next::Wait,
            Progress::Unconfirmed | Progress::Declined | Progress::Refused if two_steps && rules.cancels[index] => {
                Next::Cancel(index)
            }
            Progress::Unconfirmed if !two_steps && self.purpose == Purpose::Close && attempt.idle >= FOUND_AFTER => {
                Next::Expire(index)
            }
            Progress::Unconfirmed if !may_charge => Next::Wait,
            Progress::Unconfirmed if two_steps && attempt.age < SAME_KEY => Next::ConfirmAgain(index),
            Progress::Unconfirmed if two_steps => Next::Confirm(index, attempt.number.saturating_add(1)),
            Progress::Unconfirmed if attempt.age < rules.keys_last[index] => Next::ChargeAgain(index),
            _ => Next::Wait,
        }
    }

    fn await_buyer(&self, rules: &Rules, index: usize, attempt: &Attempt) -> Next {
        let over = attempt.age >= rules.buyer_limit || self.purpose == Purpose::Close;
        match self.progress[index] {
            Progress::Nothing => Next::Read(index),
            _ if self.purpose == Purpose::Look => Next::AwaitBuyer(index),
            Progress::Declined => Next::Cancel(index),
            progress if over => {
                if rules.cancels[index] && progress != Progress::Spent {
                    Next::Cancel(index)
                } else if rules.cancels[index] {
                    Next::Wait
                } else {
                    Next::Expire(index)
                }
            }
            // The buyer has acted, and it is for this side to confirm: under a new number, for the answer to the old key stays.
            Progress::Unconfirmed if rules.may_charge => Next::Confirm(index, attempt.number.saturating_add(1)),
            _ => Next::AwaitBuyer(index),
        }
    }

    /// What is written down before a step is made.
    pub fn before(&self, step: Next) -> Option<(usize, Attempt)> {
        let (index, number, state) = match step {
            Next::Create(index, number) => (index, number, State::Creating),
            // Its keys do not get younger.
            Next::ChargeAgain(index) => {
                let attempt = self.attempts[index].as_ref()?;
                return Some((index, Attempt { idle: Duration::ZERO, ..attempt.clone() }));
            }
            Next::Confirm(index, number) => {
                let again = self.attempts[index].as_ref().is_some_and(|one| one.state.in_doubt());
                (index, number, State::Confirming { object: self.object(index), again })
            }
            Next::Expire(index) => (index, self.number(index), State::Expired),
            _ => return None,
        };
        Some((index, Attempt::now(number, state)))
    }

    /// What is written down after an answer, if it is something else; and what the request knows then.
    pub fn after(&self, step: Next, answer: &Answer, rules: &Rules) -> (Option<Attempt>, Progress) {
        let Some((index, attempt)) = step.sent_to().and_then(|index| Some((index, self.attempts[index].as_ref()?)))
        else {
            return (None, Progress::Open);
        };
        let (state, progress) = learn(step, attempt, answer, rules.cancels[index], self.progress[index]);
        (state.map(|state| Attempt::now(attempt.number, state)), progress)
    }

    /// What an exhausted payment is. `exists`: which providers could be asked now or later.
    pub fn unpaid(&self, exists: [bool; PROVIDERS]) -> Unpaid {
        let is_over = |one: &Option<Attempt>| {
            one.as_ref().is_some_and(|one| matches!(one.state, State::Declined | State::Refused | State::Expired))
        };
        let expired = self.begun().any(|(_, one)| one.state == State::Expired);
        if expired || self.attempts.iter().zip(exists).all(|(one, exists)| !exists || is_over(one)) {
            return Unpaid::Declined;
        }
        if self.purpose == Purpose::Close { Unpaid::Closed } else { Unpaid::Open }
    }
}

/// What an answer means: the state to write down, if it is another one, and what this request knows then. `cancels`: whether
/// the provider can cancel an object; `before`: what it knew of the provider.
fn learn(step: Next, attempt: &Attempt, answer: &Answer, cancels: bool, before: Progress) -> (Option<State>, Progress) {
    let state = &attempt.state;
    let open = (None, Progress::Open);
    let not_charged = (Some(State::NotCharged), Progress::Spent);
    let known = |state| (Some(state), Progress::Nothing);
    let declined = if cancels { (None, Progress::Declined) } else { (Some(State::Declined), Progress::Spent) };
    // Another confirmation has no answer yet: only the object itself says how it ends.
    let again = matches!(state, State::Confirming { again: true, .. });
    // A "no" to a repeated request is a "no" to the first one only where the provider keeps its answer for the key, or where
    // the object is cancelled before it is believed. PayPal does neither: the first request may still arrive.
    let repeated = matches!(step, Next::ConfirmAgain(_) | Next::ChargeAgain(_)) && !cancels;
    match (step, answer) {
        (_, Answer::Charged { object }) => known(State::Charged { object: object.clone() }),
        (Next::Cancel(_), Answer::Cancelled) if before == Progress::Declined => {
            (Some(State::Declined), Progress::Spent)
        }
        (Next::Cancel(_), Answer::Cancelled) if before == Progress::Refused => (Some(State::Refused), Progress::Spent),
        (Next::Read(_) | Next::Cancel(_), Answer::Cancelled) => over(state),
        // A cancellation that was refused, whatever the object is now: this request does not ask for it again, and not even
        // the buyer's time being over helps now.
        (Next::Cancel(_), _) if matches!(state, State::NeedsBuyer { .. }) => (None, Progress::Spent),
        (Next::Create(..), Answer::Created { object }) => known(State::Created { object: object.clone() }),
        (Next::Create(..), Answer::Refused) => (Some(State::Refused), Progress::Spent),
        (Next::Confirm(..) | Next::ConfirmAgain(_), Answer::Declined | Answer::Refused | Answer::NotReached)
            if again =>
        {
            open
        }
        // Without an id nobody can have confirmed it, and what never arrived did nothing.
        (Next::Create(..), _) | (Next::Confirm(..), Answer::NotReached) => not_charged,
        // Of a repeated request a refusal says nothing: the one before may still arrive.
        (Next::Confirm(..), Answer::Refused) if cancels => (None, Progress::Refused),
        (Next::Confirm(..), Answer::Refused) => (Some(State::Refused), Progress::Spent),
        (_, Answer::Declined | Answer::NeedsBuyer { .. }) if repeated => open,
        (Next::ChargeAgain(_), Answer::Declined) => (Some(State::Declined), Progress::Spent),
        (Next::Confirm(..) | Next::ConfirmAgain(_) | Next::Read(_), Answer::Declined) => declined,
        (_, Answer::NeedsBuyer { .. }) if again => match step {
            Next::Read(_) => (None, Progress::Unconfirmed),
            _ => open,
        },
        (_, Answer::NeedsBuyer { object }) => match state {
            State::NeedsBuyer { .. } => open,
            // The confirmation may still arrive, after the buyer has acted: its own answer is needed first.
            State::Confirming { .. } if !cancels && matches!(step, Next::Read(_)) => (None, Progress::Unconfirmed),
            // It has no id of two steps, with which it could be read or cancelled.
            State::Begun if object.is_empty() => open,
            _ => (Some(State::NeedsBuyer { object: object.clone() }), Progress::Open),
        },
        // It is read next.
        (Next::Confirm(..), Answer::Unanswered | Answer::Unconfirmed) => (None, Progress::Nothing),
        (Next::Read(_) | Next::Search(_), Answer::Unconfirmed) => (None, Progress::Unconfirmed),
        (Next::Read(_), Answer::Gone) if attempt.idle >= GONE_AFTER => over(state),
        _ => open,
    }
}

/// What a charge is that a provider says it has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is written down already.
    Known,
    /// It is the charge of the payment: write this down, whatever is there.
    Ours(Attempt),
    /// The payment has another charge, or may get one: this one goes back.
    Surplus,
}

/// What it means that the object of this provider is charged, also one of which that was out of the question. `last`: the
/// object that the last attempt with the provider was about, if any is known.
pub fn found(attempts: &[Option<Attempt>; PROVIDERS], index: usize, last: Option<&str>, object: &str) -> Found {
    let charged = |one: &Attempt| matches!(one.state, State::Charged { .. });
    let open = |one: &Attempt| one.state.in_doubt() || matches!(one.state, State::NeedsBuyer { .. });
    let others =
        || attempts.iter().enumerate().filter(move |(other, _)| *other != index).filter_map(|(_, one)| one.as_ref());
    let Some(own) = &attempts[index] else { return Found::Surplus };
    if let State::Charged { object: known } = &own.state {
        return if known == object { Found::Known } else { Found::Surplus };
    }
    let is_last = last.is_none_or(|last| last == object);
    // What was over is so no more; but somebody else may be about to charge.
    let is_free = open(own) || !others().any(open);
    if is_last && is_free && !others().any(charged) {
        Found::Ours(Attempt::now(own.number, State::Charged { object: object.to_owned() }))
    } else {
        Found::Surplus
    }
}

/// What the end of an object that was not charged means.
fn over(state: &State) -> (Option<State>, Progress) {
    match state {
        State::NeedsBuyer { .. } => (Some(State::Expired), Progress::Spent),
        _ => (Some(State::NotCharged), Progress::Spent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn rules() -> Rules {
        Rules {
            may_charge: true,
            may_begin: [true, true],
            cancels: [true, false],
            keys_last: [HOUR * 23, HOUR * 5],
            buyer_limit: HOUR,
        }
    }

    fn attempt(state: State, age: Duration) -> Attempt {
        Attempt { number: 1, state, age, idle: age }
    }

    fn confirming() -> State {
        State::Confirming { object: "o".into(), again: false }
    }

    fn buyer() -> Answer {
        Answer::NeedsBuyer { object: "o".into() }
    }

    fn work(purpose: Purpose, attempts: [Option<Attempt>; PROVIDERS], unconfirmed: usize) -> Work {
        let mut work = Work::new(purpose, attempts);
        work.progress[unconfirmed] = Progress::Unconfirmed;
        work
    }

    #[rstest::rstest]
    #[case::same_key(confirming(), Duration::ZERO, Next::ConfirmAgain(1))]
    #[case::next_key(confirming(), SAME_KEY, Next::Confirm(1, 2))]
    #[case::one_step(State::Begun, HOUR * 4, Next::ChargeAgain(1))]
    #[case::its_keys_are_forgotten_after_six_hours(State::Begun, HOUR * 5, Next::Wait)]
    fn what_is_in_doubt_at_the_second_is_ended_although_it_is_no_fallback_any_more(
        #[case] state: State,
        #[case] age: Duration,
        #[case] expected: Next,
    ) {
        let rules = Rules { may_begin: [true, false], ..rules() };
        let attempts = || [None, Some(attempt(state.clone(), age))];
        assert_eq!(work(Purpose::Pay, attempts(), 1).next(&rules), expected);
        assert_eq!(work(Purpose::Pay, attempts(), 1).next(&Rules { may_charge: false, ..rules.clone() }), Next::Wait);
        for purpose in [Purpose::Close, Purpose::Look] {
            assert_eq!(work(purpose, attempts(), 1).next(&rules), Next::Wait);
        }
    }

    /// Its object is cancelled before: a new one was made, and refused, each minute for a day.
    #[rstest::rstest]
    #[case::refused(confirming(), Answer::Cancelled, Some(State::Refused))]
    #[case::it_was_charged_all_the_same(confirming(), Answer::Charged { object: "o".into() }, Some(charged("o")))]
    #[case::it_cannot_be_cancelled_now(confirming(), Answer::Unanswered, None)]
    fn a_refused_confirmation_ends_the_attempt_once_its_object_is_cancelled(
        #[case] state: State,
        #[case] cancelled: Answer,
        #[case] expected: Option<State>,
    ) {
        let mut work = Work::new(Purpose::Pay, [Some(attempt(state, Duration::ZERO)), None]);
        let (written, progress) = work.after(Next::Confirm(0, 1), &Answer::Refused, &rules());
        assert_eq!((written, progress), (None, Progress::Refused));
        work.progress[0] = progress;
        assert_eq!(work.next(&rules()), Next::Cancel(0));
        let (written, _) = work.after(Next::Cancel(0), &cancelled, &rules());
        assert_eq!(written.map(|attempt| attempt.state), expected);
    }

    /// Where nothing can be cancelled, only what is final counts as refused; and after another confirmation in doubt,
    /// nothing.
    #[test]
    fn a_refusal_elsewhere_is_as_before() {
        let work = |index: usize, again| {
            let mut attempts = [None, None];
            attempts[index] = Some(attempt(State::Confirming { object: "o".into(), again }, Duration::ZERO));
            Work::new(Purpose::Pay, attempts)
        };
        let after = |index: usize, again| work(index, again).after(Next::Confirm(index, 1), &Answer::Refused, &rules());
        assert_eq!(after(1, false), (Some(Attempt::now(1, State::Refused)), Progress::Spent));
        assert_eq!(after(0, true), (None, Progress::Open));
        assert_eq!(after(1, true), (None, Progress::Open));
    }

    #[test]
    fn of_two_in_doubt_neither_is_asked_for_money() {
        let both = || [Some(attempt(State::Begun, Duration::ZERO)), Some(attempt(State::Begun, Duration::ZERO))];
        let mut work = Work::new(Purpose::Pay, both());
        assert_eq!(work.next(&rules()), Next::Search(0));
        work.progress[0] = Progress::Unconfirmed;
        assert_eq!(work.next(&rules()), Next::Search(1));
        work.progress[1] = Progress::Unconfirmed;
        assert_eq!(work.next(&rules()), Next::Wait);
    }

    #[rstest::rstest]
    #[case::refused_at_once(false, Next::Confirm(1, 1), Answer::Refused, Some(State::Refused))]
    #[case::refused_again(false, Next::ConfirmAgain(1), Answer::Refused, None)]
    #[case::refused_with_another_key(true, Next::Confirm(1, 2), Answer::Refused, None)]
    #[case::declined_at_once(false, Next::Confirm(1, 1), Answer::Declined, Some(State::Declined))]
    #[case::declined_with_the_same_key(false, Next::ConfirmAgain(1), Answer::Declined, None)]
    #[case::for_the_buyer_at_once(false, Next::Confirm(1, 1), buyer(), Some(State::NeedsBuyer { object: "o".into() }))]
    #[case::for_the_buyer_with_the_same_key(false, Next::ConfirmAgain(1), buyer(), None)]
    #[case::for_the_buyer_with_another_key(true, Next::Confirm(1, 2), buyer(), None)]
    #[case::declined_with_another_key(true, Next::Confirm(1, 2), Answer::Declined, None)]
    #[case::not_reached_with_another_key(true, Next::Confirm(1, 2), Answer::NotReached, None)]
    #[case::the_object_itself_is_declined(true, Next::Read(1), Answer::Declined, Some(State::Declined))]
    #[case::gone_too_early(false, Next::Read(1), Answer::Gone, None)]
    fn an_answer_settles_only_what_it_is_about(
        #[case] again: bool,
        #[case] step: Next,
        #[case] answer: Answer,
        #[case] expected: Option<State>,
    ) {
        let state = State::Confirming { object: "o".into(), again };
        let work = Work::new(Purpose::Pay, [None, Some(attempt(state, Duration::ZERO))]);
        assert_eq!(work.after(step, &answer, &rules()).0.map(|attempt| attempt.state), expected);
    }

    #[test]
    fn an_object_that_is_gone_for_long_was_not_charged() {
        let work = Work::new(Purpose::Close, [None, Some(attempt(confirming(), GONE_AFTER))]);
        let (after, progress) = work.after(Next::Read(1), &Answer::Gone, &rules());
        assert_eq!((after.map(|one| one.state), progress), (Some(State::NotCharged), Progress::Spent));
    }

    #[test]
    fn a_declined_object_is_cancelled_before_it_is_written_down() {
        let mut work = Work::new(Purpose::Pay, [Some(attempt(confirming(), Duration::ZERO)), None]);
        let (after, progress) = work.after(Next::Confirm(0, 1), &Answer::Declined, &rules());
        assert_eq!((after, progress), (None, Progress::Declined));
        work.progress[0] = progress;
        assert_eq!(work.next(&rules()), Next::Cancel(0));
        let (after, _) = work.after(Next::Cancel(0), &Answer::Cancelled, &rules());
        assert_eq!(after.map(|one| one.state), Some(State::Declined));
    }

    /// PayPal's first capture may still arrive when a second one is declined; Stripe keeps its answer.
    #[rstest::rstest]
    #[case::stripe(0, Some(State::Declined))]
    #[case::paypal(1, None)]
    fn a_decline_in_one_step_counts_where_answers_are_kept(#[case] index: usize, #[case] expected: Option<State>) {
        let mut attempts = [None, None];
        attempts[index] = Some(attempt(State::Begun, Duration::ZERO));
        let work = Work::new(Purpose::Pay, attempts);
        let (after, _) = work.after(Next::ChargeAgain(index), &Answer::Declined, &rules());
        assert_eq!(after.map(|one| one.state), expected);
    }

    #[rstest::rstest]
    #[case::a_day_after_it_was_asked_last(Purpose::Close, FOUND_AFTER, Next::Expire(0))]
    #[case::before_that(Purpose::Close, HOUR * 23, Next::Wait)]
    #[case::by_nobody_but_who_closes_it(Purpose::Pay, FOUND_AFTER, Next::Wait)]
    #[case::nor_by_a_look(Purpose::Look, FOUND_AFTER, Next::Wait)]
    fn what_no_search_has_found_ends(#[case] purpose: Purpose, #[case] idle: Duration, #[case] expected: Next) {
        let begun = Attempt { idle, ..attempt(State::Begun, HOUR * 100) };
        let work = work(purpose, [Some(begun), None], 0);
        assert_eq!(work.next(&rules()), expected);
    }

    #[test]
    fn asking_again_in_one_step_is_written_down_and_makes_no_key_younger() {
        let work = work(Purpose::Pay, [Some(attempt(State::Begun, HOUR * 4)), None], 0);
        let step = work.next(&rules());
        assert_eq!(step, Next::ChargeAgain(0));
        let (_, before) = work.before(step).unwrap();
        assert_eq!((before.age, before.idle), (HOUR * 4, Duration::ZERO));
    }

    #[rstest::rstest]
    #[case::young(1, HOUR / 2, Next::Confirm(1, 1))]
    #[case::paypal_removes_it_soon(1, UNCONFIRMED_LASTS, Next::Create(1, 2))]
    #[case::stripe_keeps_it(0, HOUR * 100, Next::Confirm(0, 1))]
    fn an_old_order_is_made_anew(#[case] index: usize, #[case] age: Duration, #[case] expected: Next) {
        let mut attempts = [Some(attempt(State::Declined, age)), None];
        attempts[index] = Some(attempt(State::Created { object: "o".into() }, age));
        assert_eq!(Work::new(Purpose::Pay, attempts).next(&rules()), expected);
    }

    /// Whatever a provider always answers, a request comes to its end in a few steps.
    #[test]
    fn a_request_ends_whatever_is_answered() {
        let object = || "o".to_owned();
        let states = [
            State::Creating,
            State::Created { object: object() },
            confirming(),
            State::Confirming { object: object(), again: true },
            State::NeedsBuyer { object: object() },
            State::NotCharged,
            State::Begun,
        ];
        let answers = [
            Answer::Created { object: object() },
            Answer::Unconfirmed,
            Answer::Processing,
            buyer(),
            Answer::Declined,
            Answer::Cancelled,
            Answer::Gone,
            Answer::Refused,
            Answer::NotReached,
            Answer::Unanswered,
        ];
        // All that is read, and all that anything else is answered.
        for (state, read, other) in states.iter().flat_map(|state| {
            let all = answers.clone();
            answers.iter().flat_map(move |read| all.clone().map(|other| (state, read, other)))
        }) {
            for (index, age, purpose) in (0..PROVIDERS).flat_map(|index| {
                let purposes = [Purpose::Pay, Purpose::Close, Purpose::Look];
                [Duration::ZERO, HOUR * 100].into_iter().flat_map(move |age| purposes.map(|one| (index, age, one)))
            }) {
                let mut attempts = [None, None];
                attempts[index] = Some(attempt(state.clone(), age));
                let mut work = Work::new(purpose, attempts);
                let mut steps = 0;
                loop {
                    let step = work.next(&rules());
                    if let Some((index, before)) = work.before(step) {
                        work.attempts[index] = Some(before);
                    }
                    let Some(sent_to) = step.sent_to() else {
                        if let Next::Expire(_) = step {
                            continue;
                        }
                        break;
                    };
                    let answer = if let Next::Read(_) = step { read } else { &other };
                    let (after, progress) = work.after(step, answer, &rules());
                    if after.is_some() {
                        work.attempts[sent_to] = after;
                    }
                    work.progress[sent_to] = progress;
                    steps += 1;
                    assert!(steps < 15, "{state:?} at {index}, {purpose:?}, read {read:?}, else {other:?}");
                }
            }
        }
    }

    #[rstest::rstest]
    #[case::known([Some(charged("o")), None], Some("o"), Found::Known)]
    #[case::over([Some(State::Declined), None], Some("o"), ours())]
    #[case::over_and_the_other_one_too([Some(State::NotCharged), Some(State::Declined)], Some("o"), ours())]
    #[case::of_no_known_id([Some(State::Begun), None], None, ours())]
    #[case::open([Some(confirming()), None], Some("o"), ours())]
    #[case::of_two_in_doubt([Some(State::Begun), Some(State::Begun)], None, ours())]
    #[case::an_earlier_object([Some(State::NotCharged), None], Some("p"), Found::Surplus)]
    #[case::another_is_charged([Some(charged("p")), None], Some("p"), Found::Surplus)]
    #[case::the_other_one_has_charged([Some(State::NotCharged), Some(charged("p"))], Some("o"), Found::Surplus)]
    #[case::the_other_one_may_charge([Some(State::NotCharged), Some(confirming())], Some("o"), Found::Surplus)]
    #[case::never_asked([None, None], None, Found::Surplus)]
    fn a_charge_that_is_found(
        #[case] states: [Option<State>; PROVIDERS],
        #[case] last: Option<&str>,
        #[case] expected: Found,
    ) {
        let attempts = states.map(|state| state.map(|state| attempt(state, HOUR)));
        assert_eq!(found(&attempts, 0, last, "o"), expected);
    }

    fn charged(object: &str) -> State {
        State::Charged { object: object.into() }
    }

    fn ours() -> Found {
        Found::Ours(Attempt::now(1, charged("o")))
    }
}
