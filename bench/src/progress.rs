//! What a person sees while a run goes on: a progress bar on a terminal, lines with `--verbose`, else nothing.

use indicatif::{ProgressBar, ProgressStyle};

use crate::harness::Observer;
use crate::report::format;
use crate::results::{Iteration, Point, SideFacts};

/// Shows a run on stderr.
pub struct Progress {
    /// Hidden where stderr is no terminal.
    bar: ProgressBar,
    verbose: bool,
    name: String,
}

impl Progress {
    /// Shows nothing yet.
    pub fn new(verbose: bool) -> Progress {
        Progress {
            bar: ProgressBar::hidden(),
            verbose,
            name: String::new(),
        }
    }

    fn say(&self, text: &str) {
        if self.verbose {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }
}

impl Observer for Progress {
    fn point(&mut self, batch: usize, depth: Option<usize>, runs: usize) {
        self.bar.finish_and_clear();
        self.name = depth.map_or_else(
            || format!("batch {batch}"),
            |depth| format!("batch {batch}, depth {depth}"),
        );
        // indicatif draws on stderr, and only where it is a terminal.
        self.bar = ProgressBar::new(runs as u64);
        if let Ok(style) =
            ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg} ({eta} left)")
        {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_prefix(self.name.clone());
    }

    fn stage(&mut self, text: &str) {
        self.bar.set_message(text.to_owned());
        self.bar.tick();
        self.say(&format!("{}: {text}", self.name));
    }

    fn run(&mut self, side: &SideFacts, counted: bool, iteration: &Iteration) {
        self.bar.set_message(side.label.clone());
        self.bar.inc(1);
        self.say(&format!(
            "{}: {} {} of {}: {:.2} ms, {} tokens, {:.1} tokens/s",
            self.name,
            if counted { "iteration" } else { "warm-up" },
            iteration.index + 1,
            side.label,
            iteration.latency_ms,
            iteration.tokens,
            iteration.throughput
        ));
    }

    fn point_done(&mut self, point: &Point) {
        self.bar.finish_and_clear();
        for speedup in &point.speedups {
            self.say(&format!(
                "{}: latency against {}: {}",
                self.name,
                speedup.against,
                format::speedup(&speedup.latency)
            ));
        }
        if let Some(reason) = point.refused.as_ref().or(point.withheld.as_ref()) {
            self.say(&format!("{}: {reason}", self.name));
        }
    }
}
