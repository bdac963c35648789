//! Our evaluation of flags beside flagd's evaluators: random documents and contexts with a fixed seed. What we do otherwise stands in
//! one list, each with its reason and a document that shows it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests say what is wrong by panicking")]

mod deviations;
mod generator;
mod outcome;
mod reference;

use deviations::{DEVIATIONS, Deviation};
use generator::{Ask, Case, Generator};
use outcome::{Ours, Outcome};
use reference::Reference;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// When all of it is evaluated, in seconds since the Unix epoch.
const NOW: i64 = 1_790_000_000;
const SEED: u64 = 13;
const DOCUMENTS: usize = 5_000;
/// So many of a hundred documents have to be of use: the operator takes them.
const OF_USE: usize = 80;
/// Answers that differ and are shown.
const SHOWN: usize = 30;

#[test]
fn as_flagd_core_of_javascript() {
    compare(Reference::JavaScript);
}

#[test]
fn as_flagd_core_of_python() {
    compare(Reference::Python);
}

fn compare(reference: Reference) {
    let mut generator = Generator::new(SEED);
    let cases: Vec<Case> = (0..DOCUMENTS).map(|_| generator.case()).collect();
    let theirs = reference.answers(&cases);
    let (mut taken, mut asked, mut the_same) = (0, 0, 0);
    let (mut explained, mut wrong) = (BTreeMap::<_, usize>::new(), Vec::new());
    for (case, answers) in cases.iter().zip(theirs) {
        let ours = Ours::new(&reference.written_for_us(&case.document));
        taken += usize::from(ours.is_taken());
        for (ask, answer) in case.asks.iter().zip(answers) {
            let (ours, theirs) = (ours.outcome(ask), Outcome::of_reference(&answer));
            asked += 1;
            if ours == theirs {
                the_same += 1;
                continue;
            }
            let known = DEVIATIONS.iter().filter(|known| known.of.contains(&reference));
            match known
                .into_iter()
                .find(|known| (known.explains)(&deviations::Situation { case, ask, theirs: &theirs }))
            {
                Some(known) => *explained.entry(known.name).or_default() += 1,
                None => wrong.push((case, ask, ours, theirs)),
            }
        }
    }
    println!(
        "{reference:?}: {taken} of {DOCUMENTS} documents taken, {the_same} of {asked} answers the same, {explained:#?}"
    );
    // The simplest first.
    let rule = |case: &Case, ask: &Ask| case.document["flags"][&ask.key]["targeting"].to_string();
    wrong.sort_by_key(|(case, ask, ..)| rule(case, ask).len());
    let mut words = String::new();
    for (case, ask, ours, theirs) in wrong.iter().take(SHOWN) {
        let (rule, shared) = (rule(case, ask), &case.document["$evaluators"]);
        writeln!(words, "{rule}\n  with {shared}\n  for {}\n  ours {ours:?}\n  theirs {theirs:?}\n", ask.context)
            .unwrap();
    }
    assert!(wrong.is_empty(), "{} answers of {asked} differ, the first of them:\n{words}", wrong.len());
    assert!(taken * 100 >= DOCUMENTS * OF_USE, "{taken} of {DOCUMENTS} documents");
    // Of a hundred answers.
    let least = match reference {
        // It gives none at all where a text is no number, and hashes other texts than those of ASCII in its own way.
        Reference::JavaScript => 90,
        Reference::Python => 95,
    };
    assert!(the_same * 100 >= asked * least, "{the_same} of {asked} answers");
}

/// A deviation that is none any more has to leave the list.
#[test]
fn each_deviation_is_shown_by_its_document() {
    for reference in [Reference::JavaScript, Reference::Python] {
        let known: Vec<&Deviation> = DEVIATIONS.iter().filter(|known| known.of.contains(&reference)).collect();
        let cases: Vec<Case> = known.iter().map(|known| known.case()).collect();
        let theirs = reference.answers(&cases);
        for ((known, case), answers) in known.iter().zip(&cases).zip(theirs) {
            let ours = Ours::new(&reference.written_for_us(&case.document)).outcome(&case.asks[0]);
            let theirs = Outcome::of_reference(&answers[0]);
            assert_ne!(ours, theirs, "{reference:?}: {} ({}) is none any more", known.name, known.why);
            let situation = deviations::Situation { case, ask: &case.asks[0], theirs: &theirs };
            assert!(
                (known.explains)(&situation),
                "{reference:?}: {} does not explain {ours:?} and {theirs:?}",
                known.name
            );
        }
    }
}
