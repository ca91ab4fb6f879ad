//! The tiny model end to end on the GPU, against transformers and the CPU.

use mirage_runtime::generate::Executor;
use mirage_testing::{BOUND, Expected, error, expected, tiny};

use crate::device::{Kernel, turn};
use crate::transformers::{check_greedy, check_logits};

#[test]
fn logits_and_texts_are_those_of_transformers() {
    let model = tiny();
    for batch in [1, 3, 8, 16] {
        let kernel = Kernel::planned(&model, batch, 512);
        let turn = turn();
        let mut gpu = kernel.load(&turn, &model);
        check_logits(&mut gpu, &expected());
        check_greedy(&mut gpu, &expected());
    }
}

#[test]
fn logits_are_those_of_the_cpu() {
    let model = tiny();
    let kernel = Kernel::planned(&model, 8, 512);
    let sequences: Vec<_> = expected().iter().map(Expected::whole).collect();
    let want = kernel.load_cpu(&model).score(&sequences).unwrap();
    let turn = turn();
    let got = kernel.load(&turn, &model).score(&sequences).unwrap();
    for (sequence, (got, want)) in got.iter().zip(&want).enumerate() {
        for position in 0..want.positions() {
            let error = error(got.row(position), want.row(position));
            assert!(
                error < BOUND,
                "sequence {sequence}, position {position}: {error}"
            );
        }
    }
}
