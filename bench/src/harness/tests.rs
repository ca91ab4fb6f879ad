//! The harness with sides that make up their tokens and times.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::results::Setup;
use crate::side::{Generation, SequenceTimes, Work};
use crate::workload::tests::{answer, workload};

/// What became of all sides of a test, in order.
pub(crate) type Log = Rc<RefCell<Vec<String>>>;

/// A side whose token step takes `step` seconds and whose prompts take `prefill` seconds a token.
pub(crate) struct Fake {
    pub(crate) key: &'static str,
    pub(crate) role: Role,
    pub(crate) step: f64,
    pub(crate) prefill: f64,
    /// Largest batch there is room for.
    pub(crate) room: usize,
    /// Added to every logit of token 0.
    pub(crate) bias: f32,
    /// Tokens left out at the end of each sequence.
    pub(crate) short: usize,
    /// Runs after which it presses Ctrl-C.
    pub(crate) interrupt_after: usize,
    /// Runs after which it fails.
    pub(crate) fail_after: usize,
    /// Whether asking for its matrix products fails.
    pub(crate) no_products: bool,
    /// Tokens that the first sequence of a batch ends earlier than the others, without a time of its own.
    pub(crate) first_ends_earlier: usize,
    pub(crate) log: Log,
}

impl Fake {
    pub(crate) fn new(key: &'static str, step: f64) -> Fake {
        let role = if key == "mirage" {
            Role::Mirage
        } else {
            Role::Baseline
        };
        Fake {
            key,
            role,
            step,
            prefill: 0.001,
            room: 99,
            bias: 0.0,
            short: 0,
            interrupt_after: usize::MAX,
            fail_after: usize::MAX,
            no_products: false,
            first_ends_earlier: 0,
            log: Log::default(),
        }
    }

    pub(crate) fn boxed(self) -> Box<dyn Side> {
        Box::new(self)
    }
}

impl Side for Fake {
    fn facts(&self) -> SideFacts {
        SideFacts {
            key: self.key.to_owned(),
            label: self.key.to_owned(),
            description: "made up".to_owned(),
            role: self.role,
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Setup, SideError> {
        if shape.batch > self.room {
            return Err(SideError::NoRoom(format!(
                "batch {} needs too much memory",
                shape.batch
            )));
        }
        Ok(Setup {
            load_s: 0.25,
            ..Setup::default()
        })
    }

    fn generate(&mut self, work: &Work, interrupt: &Interrupt) -> Result<Generation, SideError> {
        let mut log = self.log.borrow_mut();
        log.push(self.key.to_owned());
        let runs = log.iter().filter(|key| *key == self.key).count();
        if runs > self.interrupt_after {
            interrupt.set();
            return Err(SideError::Interrupted);
        }
        if runs > self.fail_after {
            return Err(SideError::Failed(anyhow::anyhow!("it broke")));
        }
        let count = work.max_tokens - self.short;
        let given: usize = work
            .sequences
            .iter()
            .map(|sequence| sequence.prompt.len())
            .sum();
        let first = self.prefill * given as f64 + self.step;
        let last = first + self.step * (count - 1) as f64;
        let times = SequenceTimes {
            first,
            last: Some(last),
            gaps: vec![self.step; count - 1],
        };
        let mut sequences = vec![times; work.sequences.len()];
        let mut tokens = vec![vec![2; count]; work.sequences.len()];
        // Not in the gate, whose texts are all of one length.
        if self.first_ends_earlier > 0 && work.max_tokens != gate::NEW_TOKENS {
            sequences[0].last = None;
            tokens[0].truncate(count - self.first_ends_earlier);
        }
        Ok(Generation {
            tokens,
            wall: last,
            device: Some(0.9 * last),
            device_step: Some(self.step),
            sequences,
        })
    }

    fn logits(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>, SideError> {
        Ok((from..tokens.len())
            .flat_map(|_| [self.bias, 1.0, 2.0])
            .collect())
    }

    fn matrix_products(&mut self) -> Result<Vec<crate::results::MatrixProduct>, SideError> {
        match self.no_products {
            true => Err(SideError::Failed(anyhow::anyhow!("no clock"))),
            false => Ok(Vec::new()),
        }
    }
}

pub(crate) fn model() -> ModelFacts {
    ModelFacts {
        name: "made up".to_owned(),
        parameters: 1,
        layers: 1,
        vocabulary: 3,
        context: 100,
        step_bytes: 1_000_000,
        kv_bytes_per_position: 1000,
        weights_hash: String::new(),
        graph_hash: String::new(),
    }
}

pub(crate) fn schedule(batch_sizes: &[usize], warmup: usize, iterations: usize) -> Schedule {
    Schedule {
        batch_sizes: batch_sizes.to_vec(),
        depths: vec![None],
        warmup,
        iterations,
        answer: answer(11),
    }
}

pub(crate) fn run(schedule: &Schedule, sides: &mut [Box<dyn Side>]) -> Measured {
    let workload = workload(&[("a", "abcd"), ("b", "abcdefgh")], 11, 100);
    let model = model();
    let harness = Harness {
        schedule,
        workload: &workload,
        model: &model,
        bandwidth_gb_s: Some(1.0),
        interrupt: Interrupt::default(),
    };
    harness.run(sides, &mut Silent)
}

#[test]
fn sides_take_turns() {
    let log = Log::default();
    let side = |key| {
        Box::new(Fake {
            log: log.clone(),
            ..Fake::new(key, 0.01)
        }) as Box<dyn Side>
    };
    let measured = run(&schedule(&[2], 1, 3), &mut [side("mirage"), side("b1")]);
    let gate = 2;
    let order: Vec<_> = log.borrow()[gate..]
        .iter()
        .map(|key| key.chars().next().unwrap_or(' '))
        .collect();
    assert_eq!(order.into_iter().collect::<String>(), "mbbmmbbm");
    let point = &measured.points[0];
    let turns: Vec<_> = point.sides[0]
        .iterations
        .iter()
        .map(|row| (row.index, row.turn))
        .collect();
    assert_eq!(turns, [(0, 1), (1, 0), (2, 1)]);
    assert!(measured.complete);
}

#[test]
fn numbers_are_those_of_the_sides() {
    let measured = run(
        &schedule(&[2], 0, 4),
        &mut [
            Fake::new("mirage", 0.01).boxed(),
            Fake::new("b1", 0.02).boxed(),
        ],
    );
    let point = &measured.points[0];
    let ours = point.side("mirage").expect("mirage");
    // 12 prompt tokens of 1 ms, then 11 steps of 10 ms.
    assert!((ours.latency_ms.mean - 122.0).abs() < 1e-9);
    assert!((ours.throughput.mean - 22.0 / 0.122).abs() < 1e-9);
    assert!((ours.ttft_ms.as_ref().expect("times").mean - 22.0).abs() < 1e-9);
    assert!((ours.tpot_ms.as_ref().expect("times").mean - 10.0).abs() < 1e-9);
    assert!((ours.throughput_per_user.as_ref().expect("times").mean - 100.0).abs() < 1e-9);
    assert_eq!(ours.itl_ms.as_ref().expect("gaps").count, 4 * 2 * 10);
    assert_eq!(ours.categories.len(), 2);
    // 1 MB of weights and 1 kB for each position of two sequences: 12 prompt tokens, 5.5 of each answer on the mean.
    let roofline = ours.roofline.as_ref().expect("a bandwidth");
    assert!((roofline.step_bytes - 1_023_000.0).abs() < 1e-6);
    assert!((roofline.share.expect("a share") - 0.1023).abs() < 1e-9);
    let speedup = point.speedup("b1").expect("comparable");
    assert!((speedup.latency.value - 232.0 / 122.0).abs() < 1e-9);
    assert!((speedup.throughput.value - 232.0 / 122.0).abs() < 1e-9);
}

#[test]
fn no_speedup_where_the_sides_disagree() {
    let wrong = Fake {
        bias: 1.0,
        ..Fake::new("b1", 0.02)
    };
    let measured = run(
        &schedule(&[1], 0, 2),
        &mut [Fake::new("mirage", 0.01).boxed(), wrong.boxed()],
    );
    let point = &measured.points[0];
    assert!(point.speedups.is_empty());
    assert!(point.gate.as_ref().is_some_and(|gate| !gate.passed));
    let withheld = point.withheld.as_deref().expect("a reason");
    assert!(
        withheld.starts_with("the sides do not agree: "),
        "{withheld}"
    );
}

#[test]
fn no_speedup_of_unequal_work() {
    let short = Fake {
        short: 1,
        bias: 0.0,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), short.boxed()];
    let measured = run(&schedule(&[1], 0, 2), &mut sides);
    assert!(measured.points[0].speedups.is_empty());
}

#[test]
fn a_batch_without_room_is_refused_and_the_run_goes_on() {
    let small = Fake {
        room: 2,
        ..Fake::new("b1", 0.02)
    };
    let measured = run(
        &schedule(&[4, 1], 0, 2),
        &mut [Fake::new("mirage", 0.01).boxed(), small.boxed()],
    );
    let refused = measured.points[0].refused.as_deref().expect("no room");
    assert_eq!(
        refused,
        format!("b1: batch 4 needs too much memory; {NO_ROOM_ADVICE}")
    );
    assert!(measured.points[0].sides.is_empty());
    assert_eq!(measured.points[1].speedups.len(), 1);
    assert!(measured.complete);
}

#[test]
fn ctrl_c_keeps_whole_iterations() {
    // One run of the gate, then three iterations.
    let broken = Fake {
        interrupt_after: 4,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), broken.boxed()];
    let measured = run(&schedule(&[2, 4], 0, 9), &mut sides);
    assert!(!measured.complete);
    assert_eq!(measured.points.len(), 1);
    let counts: Vec<_> = measured.points[0]
        .sides
        .iter()
        .map(|side| side.iterations.len())
        .collect();
    assert_eq!(counts, [3, 3]);
    assert_eq!(measured.points[0].speedups.len(), 1);
}

#[test]
fn ctrl_c_before_the_first_iteration_leaves_no_empty_point() {
    let broken = Fake {
        interrupt_after: 0,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), broken.boxed()];
    let measured = run(&schedule(&[2, 4], 0, 9), &mut sides);
    assert!(!measured.complete && measured.failure.is_none());
    assert!(measured.points.is_empty());
}

#[test]
fn a_failure_keeps_what_was_measured_of_its_point() {
    // One run of the gate, then three iterations.
    let broken = Fake {
        fail_after: 4,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), broken.boxed()];
    let measured = run(&schedule(&[2, 4], 0, 9), &mut sides);
    let failure = measured.failure.expect("it broke");
    assert_eq!(failure.to_string(), "b1: it broke");
    assert!(!measured.complete);
    assert_eq!(measured.points.len(), 1);
    let counts = measured.points[0]
        .sides
        .iter()
        .map(|side| side.iterations.len());
    assert_eq!(counts.collect::<Vec<_>>(), [3, 3]);
    assert_eq!(measured.points[0].speedups.len(), 1);
}

#[test]
fn matrix_products_that_fail_are_a_note() {
    let side = Fake {
        no_products: true,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), side.boxed()];
    let measured = run(&schedule(&[1, 2], 0, 2), &mut sides);
    assert!(measured.complete && measured.failure.is_none());
    assert_eq!(measured.points.len(), 2);
    assert_eq!(
        measured.notes[0],
        "The matrix products of b1 at batch 1 were not measured: no clock."
    );
}

#[test]
fn sequences_without_a_time_count_on_no_side() {
    let cut = Fake {
        first_ends_earlier: 5,
        ..Fake::new("b1", 0.02)
    };
    let mut sides = [Fake::new("mirage", 0.01).boxed(), cut.boxed()];
    let measured = run(&schedule(&[2], 0, 3), &mut sides);
    let point = &measured.points[0];
    for (side, step) in [("mirage", 10.0), ("b1", 20.0)] {
        let numbers = point.side(side).expect("measured");
        let tpot = numbers.tpot_ms.as_ref().expect("one of two sequences");
        assert_eq!(tpot.count, 3, "{side}");
        assert!((tpot.mean - step).abs() < 1e-9, "{side}: {}", tpot.mean);
        let rows = numbers.iterations.iter().flat_map(|row| &row.sequences);
        assert_eq!(rows.filter(|row| row.latency_ms.is_some()).count(), 3);
    }
}

#[test]
fn the_gate_has_something_to_compare_where_all_prompts_are_long() {
    let text = "x".repeat(gate::LONGEST_PROMPT + 1);
    let (workload, model) = (workload(&[("a", &text)], 11, 100), model());
    let harness = Harness {
        schedule: &schedule(&[1], 0, 1),
        workload: &workload,
        model: &model,
        bandwidth_gb_s: None,
        interrupt: Interrupt::default(),
    };
    let mut sides = [
        Fake::new("mirage", 0.01).boxed(),
        Fake::new("b1", 0.02).boxed(),
    ];
    let measured = harness.run(&mut sides, &mut Silent);
    let gate = measured.points[0].gate.as_ref().expect("two sides");
    assert!(gate.passed, "{:?}", gate.comparisons);
    assert_eq!(gate.comparisons[0].sequences, 1);
}

#[test]
fn the_gate_says_which_side_it_tested() {
    let mut sides = [Fake::new("b0", 0.03).boxed(), Fake::new("b1", 0.02).boxed()];
    let measured = run(&schedule(&[1], 0, 1), &mut sides);
    let gate = measured.points[0].gate.as_ref().expect("two sides");
    assert_eq!(
        (gate.tested.as_str(), gate.comparisons[0].side.as_str()),
        ("b0", "b1")
    );
}

#[test]
fn one_side_alone_is_measured_without_a_gate() {
    let measured = run(
        &schedule(&[1, 2], 1, 2),
        &mut [Fake::new("mirage", 0.01).boxed()],
    );
    assert_eq!(measured.points.len(), 2);
    assert!(
        measured
            .points
            .iter()
            .all(|point| point.gate.is_none() && point.speedups.is_empty())
    );
    assert!(measured.sample.is_some());
}
