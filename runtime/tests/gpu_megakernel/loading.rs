//! Weights on the device are, byte for byte, those that the CPU packs.

use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::megakernel::{Megakernel, Staging};
use mirage_runtime::pack::HostWeights;
use mirage_testing::{Choice, Model, SIZES, Sizes, llama3, qwen3, tiny};

use crate::device::{Kernel, turn};

/// Loads through each of the staging memories, and follows the progress.
#[track_caller]
fn check(model: &Model, kernel: &Kernel, stagings: &[Staging]) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let want = HostWeights::pack(&kernel.program, &checkpoint).unwrap();
    let bytes = (want.streams.len() + want.embedding.len() * 2) as u64;
    let turn = turn();
    for &staging in stagings {
        let mut heard = vec![0];
        let loaded = Megakernel::load_through(
            &turn.gpu,
            kernel.program.clone(),
            &kernel.cubin,
            &checkpoint,
            staging,
            &mut |arrived, total| {
                assert_eq!(total, bytes);
                heard.push(arrived);
            },
        );
        let loaded = loaded.unwrap_or_else(|error| panic!("{staging:?}: {error}"));
        assert!(heard.is_sorted(), "{heard:?}");
        assert_eq!(heard.last(), Some(&bytes), "{staging:?}");
        let got = loaded.read_weights().unwrap();
        // Megabytes: not for `assert_eq`.
        assert!(got.streams == want.streams, "{staging:?}: streams");
        assert!(got.embedding == want.embedding, "{staging:?}: embedding");
        assert!(got == want, "{staging:?}: offsets, norms or angles");
        let report = loaded.load_report();
        assert!(report.prepare + report.read + report.wait <= report.total);
    }
}

fn staging(buffers: usize, bytes: usize) -> Staging {
    Staging { buffers, bytes }
}

#[test]
fn the_tiny_model_lies_as_it_was_packed() {
    let model = tiny();
    // Pieces in turns on three lanes, one after the other on one, and as it is by default.
    let stagings = [
        staging(3, 64 << 10),
        staging(1, 1 << 20),
        Staging::default(),
    ];
    for batch in [1, 8] {
        check(&model, &Kernel::planned(&model, batch, 512), &stagings);
    }
}

#[test]
fn models_that_divide_unevenly_lie_as_they_were_packed() {
    let untied = llama3(Sizes {
        tied: false,
        ..SIZES
    });
    // The least possible: a row tile at a time.
    let stagings = [staging(2, 0), staging(4, 20_000)];
    check(&untied, &Kernel::planned(&untied, 1, 64), &stagings);
    let tied = qwen3(SIZES);
    check(&tied, &Kernel::planned(&tied, 2, 64), &stagings);
}

#[test]
fn columns_split_over_ctas_lie_as_they_were_packed() {
    let model = qwen3(SIZES);
    for choice in Choice::all() {
        let kernel = Kernel::chosen(&model, &choice, 2, 64);
        check(&model, &kernel, &[staging(2, 8_000)]);
    }
}
