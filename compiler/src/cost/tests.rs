//! Between what was measured, constants are interpolated; a prediction goes the way that its causes go.

use super::*;
use crate::arch::Arch;
use crate::driver;
use crate::plan::Target;
use crate::program::Program;
use crate::typed::ModelConfig;

fn h100() -> Machine {
    Profile::h100().machine
}

#[track_caller]
fn close(found: f64, expect: f64) {
    assert!((found - expect).abs() < 1e-9, "{found}, not {expect}");
}

#[test]
fn exchanges_are_what_was_measured_and_between_it() {
    let e = h100().exchange;
    let of = |producers| Fan {
        producers,
        ctas: 128,
    };
    let (group, grid) = (of(16), of(128));
    close(e.idle(384, group), e.group.idle[1]);
    close(e.idle(1408, grid), e.grid.idle[2]);
    close(e.busy(1408, grid, 32 << 10), e.grid.beside[1][2]);
    // Half way, by the words, by the producers' logarithm, and by the bytes in flight.
    let half = |a: f64, b: f64| (a + b) / 2.0;
    close(e.idle(256, group), half(e.group.idle[0], e.group.idle[1]));
    let between = ExchangeConstants::between(&[1.0; 5], &[4.0; 5], 500, of(32));
    close(between, 2.0);
    let in_flight = e.busy(1408, grid, 24 << 10);
    close(in_flight, half(e.grid.beside[0][2], e.grid.beside[1][2]));
    // The least is the smallest that was measured, fewer producers than a group are a group, and beyond the largest it goes on.
    close(e.idle(1, of(2)), e.group.idle[0]);
    assert!(e.idle(10_000, grid) > e.grid.idle[4]);
}

#[test]
fn a_rings_rate_is_what_was_measured_and_between_it() {
    let machine = h100();
    let rings = machine.stream.rings;
    close(machine.ring_rate(16 << 10, 1, 1.0), rings[2][0] * GBPS);
    close(machine.ring_rate(8 << 10, 4, 1.0), rings[1][3] * GBPS);
    let half = (rings[1][0] + rings[2][0]) / 2.0;
    close(machine.ring_rate(12 << 10, 1, 1.0), half * GBPS);
    // Half the CTAs with two pages each have as much in flight as all with one.
    close(machine.ring_rate(16 << 10, 2, 0.5), rings[2][0] * GBPS);
    // Never above the best, and less for less than the smallest page.
    close(machine.ring_rate(16 << 10, 6, 1.0), machine.stream_rate());
    close(machine.ring_rate(2 << 10, 1, 1.0), rings[0][0] / 2.0 * GBPS);
}

fn program(batch: usize) -> Program {
    let target = Target {
        gpu: GpuModel::default_for(Arch::Sm90a),
        batch,
        max_seq: 4096,
    };
    let graph = include_str!("../../../graphs/qwen3.ron");
    let compiled = driver::compile(graph, "qwen3.ron", &ModelConfig::none(), &target).unwrap();
    compiled.program
}

#[test]
fn a_prediction_has_every_phase_and_none_is_free() {
    for batch in [1, 8] {
        let program = program(batch);
        for (decode, (_, step)) in [false, true].into_iter().zip(program.steps()) {
            let predicted = Prediction::new(&program, &h100(), decode, 1000);
            assert_eq!(predicted.phases.len(), step.layer.len());
            let all = predicted.phases.iter().chain([&predicted.head]);
            assert!(all.clone().all(|time| *time > 0.0), "{predicted:?}");
            assert!(predicted.total > all.sum(), "{predicted:?}");
        }
    }
}

#[test]
fn depth_batch_and_a_slower_memory_take_longer() {
    let total = |program: &Program, machine: &Machine, depth| {
        Prediction::new(program, machine, true, depth).total
    };
    let (one, eight, machine) = (program(1), program(8), h100());
    assert!(total(&one, &machine, 1000) > total(&one, &machine, 64));
    assert!(total(&one, &machine, 4000) > total(&one, &machine, 1000));
    assert!(total(&eight, &machine, 1000) > total(&one, &machine, 1000));
    let slower = GpuModel {
        hbm_gbps: 1000.0,
        ..GpuModel::default_for(Arch::Sm90a)
    };
    let slower = Machine::of(&slower);
    let times = total(&one, &slower, 64) / total(&one, &machine, 64);
    // Not three times: what is no stream takes as long as before.
    assert!((1.5..3.06).contains(&times), "{times}");
}
