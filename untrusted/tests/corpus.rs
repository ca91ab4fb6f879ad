//! The fuzzers' seeds, and the same few thousand changes of them every time.

use std::path::Path;
use std::time::Duration;

use mirage_untrusted::memory::Bounded;
use mirage_untrusted::{Round, Seeds, TARGETS, Target};

#[global_allocator]
static MEMORY: Bounded = Bounded;

/// A seed whose name begins with `good` is taken, and one that begins with `bad` is refused.
#[test]
fn seeds_are_what_their_names_say() {
    for target in TARGETS {
        for (name, seed) in Seeds::of(target).files {
            let good = name.starts_with("good");
            assert!(good || name.starts_with("bad"), "{name}");
            assert_eq!(target.run(&seed), good, "{}/{name}", target.name());
        }
    }
}

fn check(target: Target, inputs: usize) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let round = Round::run(target, 1, inputs, Duration::MAX, folder);
    let Round {
        tried,
        taken,
        slowest,
    } = round;
    println!(
        "{}: {tried} inputs, {taken} taken, slowest {slowest:?}",
        target.name()
    );
    assert_eq!(tried, inputs);
    // Otherwise nothing but the first check of a reader would have been tried.
    assert!(taken * 200 > tried && taken < tried, "{taken} of {tried}");
}

#[test]
fn graphs() {
    check(Target::Graph, 1500);
}

#[test]
fn configs() {
    check(Target::Config, 1000);
}

#[test]
fn safetensors() {
    check(Target::Safetensors, 4000);
}

#[test]
fn prompts() {
    check(Target::Prompts, 4000);
}

#[test]
fn tokenizers() {
    check(Target::Tokenizer, 2000);
}
