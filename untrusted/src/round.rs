//! A run of one target: its seeds as they are, then changes of them, each watched for panics and for its time.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::mutate::Mutator;
use crate::targets::Target;

/// Time in which an input must be done with, also where the machine is busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// A target's seeds.
pub struct Seeds {
    /// File names and contents, in the order of the names.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Seeds {
    /// Reads them.
    ///
    /// # Panics
    /// Where there are none.
    pub fn of(target: Target) -> Seeds {
        let entries = fs::read_dir(target.corpus()).expect("the corpus is there");
        let mut files: Vec<(String, Vec<u8>)> = entries
            .map(|entry| {
                let path = entry.expect("an entry").path();
                let name = path.file_name().expect("a name").to_string_lossy();
                (name.into_owned(), fs::read(&path).expect("a seed"))
            })
            .collect();
        files.sort();
        assert!(!files.is_empty(), "no seeds for {}", target.name());
        Seeds { files }
    }
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    /// Inputs that were tried.
    pub tried: usize,
    /// Those that mirage took.
    pub taken: usize,
    /// The longest time that one took.
    pub slowest: Duration,
}

impl Round {
    /// Runs all seeds, then changes of them, until so many inputs were tried or the time is over.
    ///
    /// # Panics
    /// Where an input makes mirage panic, or is not done with in time. The input is left in `folder`.
    pub fn run(target: Target, seed: u64, most: usize, time: Duration, folder: &Path) -> Round {
        let current = Arc::new(Mutex::new(Vec::new()));
        let (done, progress) = channel();
        let shown = Arc::clone(&current);
        let worker = thread::spawn(move || {
            let seeds: Vec<Vec<u8>> = Seeds::of(target)
                .files
                .into_iter()
                .map(|(_, seed)| seed)
                .collect();
            let mut mutator = Mutator::new(seed);
            let mut round = Round::default();
            let start = Instant::now();
            while round.tried < most && start.elapsed() < time {
                let input = match seeds.get(round.tried) {
                    Some(seed) => seed.clone(),
                    None => mutator.input(&seeds),
                };
                input.clone_into(&mut shown.lock().expect("not poisoned"));
                let began = Instant::now();
                let taken = catch_unwind(AssertUnwindSafe(|| target.run(&input))).ok()?;
                round.slowest = round.slowest.max(began.elapsed());
                round.tried += 1;
                round.taken += usize::from(taken);
                // Nobody listens any more only where the run has failed.
                let _ = done.send(());
            }
            Some(round)
        });
        let kept = |what: &str| -> PathBuf {
            let path = folder.join(format!("{}-{what}", target.name()));
            fs::write(&path, &*current.lock().expect("not poisoned")).expect("the input is kept");
            path
        };
        loop {
            match progress.recv_timeout(PATIENCE) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("an input hangs: {}", kept("hang").display())
                }
            }
        }
        match worker.join() {
            Ok(Some(round)) => round,
            Ok(None) | Err(_) => panic!("an input panics: {}", kept("panic").display()),
        }
    }
}
