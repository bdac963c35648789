//! Breadth-first search over everything a system can do.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasherDefault, Hash, Hasher},
};

/// Something that moves in steps.
pub trait System {
    /// Everything that what comes next depends on.
    type State: Clone + Eq + Hash;
    /// What happens.
    type Step: Clone;
    /// What must not be.
    type Violation;

    /// Where it begins.
    fn initial(&mut self) -> Self::State;
    /// Everything that can happen in a state, and where it leads.
    fn steps(&mut self, state: &Self::State) -> Steps<Self::Step, Self::State, Self::Violation>;
    /// Whether a state is as it should be.
    fn check(&mut self, state: &Self::State) -> Result<(), Self::Violation>;
}

/// Steps, and where each leads.
pub type Steps<P, S, V> = Vec<(P, Result<S, V>)>;

/// What a search found.
pub struct Found<P, V> {
    /// Different states.
    pub states: usize,
    /// Steps that were followed, also those into a state that was known.
    pub transitions: usize,
    /// Steps from the beginning to the state that is farthest from it.
    pub depth: u32,
    /// The search ended before all was seen.
    pub cut_short: bool,
    /// The first violation; there is none that fewer steps lead to.
    pub violation: Option<Counterexample<P, V>>,
}

/// A way to a violation.
pub struct Counterexample<P, V> {
    /// What is wrong.
    pub violation: V,
    /// What happened, in this order.
    pub steps: Vec<P>,
}

/// Follows every step from every state once, nearest states first, until all was seen, a violation is found, or `limit`
/// states are known.
pub fn explore<S: System>(system: &mut S, limit: usize) -> Found<S::Step, S::Violation> {
    let mut found = Found { states: 1, transitions: 0, depth: 0, cut_short: false, violation: None };
    let mut came_from: Vec<Option<(usize, S::Step)>> = vec![None];
    let initial = system.initial();
    let mut known: Set<S::State> = Set::default();
    known.insert(initial.clone());
    let mut waiting = VecDeque::from([(0, 0, initial)]);
    while let Some((index, depth, state)) = waiting.pop_front() {
        found.depth = depth;
        if let Err(violation) = system.check(&state) {
            found.violation = Some(Counterexample { violation, steps: way(&came_from, index, None) });
            return found;
        }
        for (step, next) in system.steps(&state) {
            found.transitions += 1;
            let next = match next {
                Ok(next) => next,
                Err(violation) => {
                    let steps = way(&came_from, index, Some(step));
                    found.violation = Some(Counterexample { violation, steps });
                    return found;
                }
            };
            if known.contains(&next) {
                continue;
            }
            if found.states == limit {
                found.cut_short = true;
                return found;
            }
            known.insert(next.clone());
            waiting.push_back((came_from.len(), depth + 1, next));
            came_from.push(Some((index, step)));
            found.states += 1;
        }
    }
    found
}

fn way<P: Clone>(came_from: &[Option<(usize, P)>], mut index: usize, last: Option<P>) -> Vec<P> {
    let mut steps: Vec<_> = last.into_iter().collect();
    while let Some((before, step)) = &came_from[index] {
        steps.push(step.clone());
        index = *before;
    }
    steps.reverse();
    steps
}

/// A map with a hash that is cheap without optimisation, too. Nobody chooses its keys to make them collide.
pub type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mixer>>;
/// A set with the same hash.
pub type Set<K> = HashSet<K, BuildHasherDefault<Mixer>>;

/// Folds words into a hash by rotating and multiplying.
#[derive(Default)]
pub struct Mixer(u64);

impl Mixer {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        // The map looks at the topmost and at the lowest bits; the multiplication leaves the lowest ones poor.
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.mix(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.mix(value.cast_unsigned() as u64);
    }
}
