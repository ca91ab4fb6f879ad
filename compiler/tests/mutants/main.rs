//! Wrong programs by the thousand: every kind of change that a fault of lowering could make, on programs of several models,
//! GPUs and batches. The verifier must refuse all of them.
//!
//! A kind takes a correct program and random numbers, and gives a program that is wrong, or nothing where it does not
//! apply. It must not make what is merely different: another page size that fits, a phase that collects once more.
//!
//! What a program does not say cannot be found wrong in it: [`model`] has the kinds that leave a sound program of another
//! model. Only a comparison with the reference shows these.

mod memory;
mod model;
mod phases;
mod ring;
mod sizes;
mod subjects;
mod weights;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use mirage_compiler::program::Program;
use mirage_testing::Random;

use subjects::{Subject, subjects};

/// Mutants that are made at least.
const ENOUGH: usize = 2000;

/// A way to make a program wrong.
struct Kind {
    name: &'static str,
    make: fn(&Subject, &mut Random) -> Option<Program>,
}

/// What became of one kind's mutants.
struct Row {
    name: &'static str,
    made: usize,
    rejected: usize,
}

impl Row {
    fn print(&self, whose: &str) {
        let Row {
            name,
            made,
            rejected,
        } = self;
        println!("{name:<42} {made:>5} {rejected:>8}  {whose}");
    }
}

/// So many different mutants of each kind, or as many as there are, spread over the subjects.
fn run(kinds: &[Kind], subjects: &[Subject], rounds: usize, must_reject: bool) -> Vec<Row> {
    let mut seen = HashSet::new();
    let of_kind = |(number, kind): (usize, &Kind)| {
        let mut row = Row {
            name: kind.name,
            made: 0,
            rejected: 0,
        };
        for (at, subject) in subjects.iter().enumerate() {
            for round in 0..rounds {
                let seed = ((number * subjects.len() + at) * rounds + round) as u64;
                let Some(mutant) = (kind.make)(subject, &mut Random::new(seed)) else {
                    continue;
                };
                let (name, what) = (kind.name, &subject.name);
                assert_ne!(mutant, subject.program, "{name} left {what} as it was");
                let mut hasher = DefaultHasher::new();
                format!("{mutant:?}").hash(&mut hasher);
                if !seen.insert(hasher.finish()) {
                    continue;
                }
                row.made += 1;
                let refused = mutant.verify().is_err();
                row.rejected += usize::from(refused);
                assert!(
                    refused || !must_reject,
                    "{name} (seed {seed}) is not found in {what}:\n{mutant}"
                );
            }
        }
        assert!(row.made > 0, "{} applies to no program", row.name);
        row
    };
    kinds.iter().enumerate().map(of_kind).collect()
}

#[test]
fn mutants_are_rejected() {
    let subjects = subjects();
    for subject in &subjects {
        assert_eq!(subject.program.verify(), Ok(()), "{}", subject.name);
    }
    let schedule: Vec<Kind> = [
        phases::kinds(),
        memory::kinds(),
        ring::kinds(),
        weights::kinds(),
        sizes::kinds(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let rows = run(&schedule, &subjects, 3, true);
    let of_model = run(&model::kinds(), &subjects[..4], 2, false);

    println!("{:<42} {:>5} {:>8}", "kind", "made", "rejected");
    rows.iter().for_each(|row| row.print(""));
    of_model
        .iter()
        .for_each(|row| row.print("another model: found by running"));
    let all = || rows.iter().chain(&of_model);
    let made: usize = all().map(|row| row.made).sum();
    let rejected: usize = all().map(|row| row.rejected).sum();
    println!(
        "{made} mutants of {} kinds on {} programs, {rejected} rejected by the verifier",
        all().count(),
        subjects.len()
    );
    assert!(made >= ENOUGH, "{made} mutants");
    assert!(rejected * 100 >= made * 95, "{rejected} of {made}");
}
