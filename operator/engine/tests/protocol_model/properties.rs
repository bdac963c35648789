//! What must hold, and what a search must have come across for its silence to mean anything.

use crate::state::Step;

/// What must not be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The property that is hurt.
    pub property: Property,
    /// In words.
    pub what: String,
    /// What leads there from the state that is wrong, without any more faults.
    pub ahead: Vec<Step>,
}

impl Violation {
    /// A violation of `property`.
    pub fn new(property: Property, what: impl Into<String>) -> Self {
        Self { property, what: what.into(), ahead: Vec::new() }
    }
}

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// No intent takes effect twice, and no two do the same about one failure.
    OnlyOnce,
    /// Nothing takes effect that the ledger never knew of.
    WrittenFirst,
    /// What the ledger had, it has, unless a person deleted it; and what was over stays over.
    NotLost,
    /// Whatever is in flight is looked at again, and comes to its end.
    NextStep,
}

/// A situation that the protocol is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landmark {
    /// Two intents are in flight at once.
    TwoInFlight,
    /// An operator dies after the intent is written and before it takes effect.
    CrashBetweenIntentAndAct,
    /// An operator dies after an effect that it heard of, and before that is written.
    CrashBetweenActAndRecord,
    /// It took effect, and its operator does not hear so.
    AnswerLost,
    /// A write is refused: the record is there already, or is not any more as it was read.
    StaleWriteRefused,
    /// A record is begun that was begun before.
    SeenTwice,
    /// A person deletes a record while its action is under way.
    DeletedInFlight,
    /// A record is made after a person deleted one.
    BegunAgain,
    /// A write is accepted after its operator gave up on it or died.
    LateWriteAccepted,
    /// An intent is asked for once more where it is done already.
    AskedAgain,
    /// A request takes effect after its operator gave up on it or died.
    LateEffect,
    /// A request is on its way that nobody waits for, and there is nothing left for it to do.
    LateRepetition,
    /// Both replicas take themselves for the leader, and both wait for an answer.
    TwoLeadersAtWork,
    /// A process answers that it is not the one that is meant.
    OtherProcess,
    /// An eviction finds the successor of the pod that is meant.
    OtherPod,
    /// A disruption budget refuses an eviction.
    EvictionRefused,
    /// An operator sees that it was done, though nobody wrote that down.
    FoundDone,
    /// An operator decides before it heard any pod, while something is in flight.
    BlindDecision,
    /// The second step follows the first.
    SecondRung,
    /// An intent succeeds.
    Succeeded,
    /// An intent fails.
    Failed,
    /// An intent is given up: what it was for is gone, or well.
    Cancelled,
}

/// A set of landmarks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Landmarks(u32);

impl Landmarks {
    /// Adds one.
    pub fn insert(&mut self, landmark: Landmark) {
        self.0 |= 1 << landmark as u32;
    }

    /// Adds all of another set.
    pub fn extend(&mut self, others: Self) {
        self.0 |= others.0;
    }

    /// Whether it is among them.
    pub fn contains(self, landmark: Landmark) -> bool {
        self.0 & (1 << landmark as u32) != 0
    }
}
