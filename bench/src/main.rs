//! `mirage-bench`: see the library's [`mirage_bench::cli`] for its flags.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use mirage_bench::app;
use mirage_bench::cli::Args;
use mirage_bench::side::Interrupt;

fn main() -> ExitCode {
    let args = Args::parse();
    let interrupt = Interrupt::default();
    let asked = interrupt.clone();
    let handler = ctrlc::set_handler(move || {
        if asked.is_set() {
            // The second time it is meant at once.
            std::process::exit(130);
        }
        asked.set();
        // If stderr is gone there is nobody left to tell.
        let _ = writeln!(
            std::io::stderr(),
            "interrupted: writing what was measured; press Ctrl-C again to leave at once"
        );
    });
    let outcome = handler
        .map_err(anyhow::Error::new)
        .and_then(|()| app::run(&args, &interrupt));
    match outcome {
        Ok(outcome) => ExitCode::from(outcome.code()),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
