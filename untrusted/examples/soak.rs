//! Long runs without a fuzzer: `soak TARGET SECONDS [SEED]`. An input that makes mirage panic or hang is left in this folder.

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use mirage_untrusted::memory::Bounded;
use mirage_untrusted::{Round, TARGETS};

#[global_allocator]
static MEMORY: Bounded = Bounded;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).map(|text| text.parse::<u64>());
    let target = arguments.first();
    let target = TARGETS
        .into_iter()
        .find(|t| target.is_some_and(|name| name == t.name()));
    let (Some(target), Some(Ok(seconds)), Ok(seed)) =
        (target, number(1), number(2).unwrap_or(Ok(1)))
    else {
        let names = TARGETS.map(|target| target.name()).join(", ");
        eprintln!("usage: soak TARGET SECONDS [SEED]; targets: {names}");
        return ExitCode::from(2);
    };
    let time = Duration::from_secs(seconds);
    let round = Round::run(target, seed, usize::MAX, time, Path::new("."));
    println!("{}: {round:?}", target.name());
    ExitCode::SUCCESS
}
