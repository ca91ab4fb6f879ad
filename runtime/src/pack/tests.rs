//! Unpacking gives every element of every weight back exactly once, whatever the mesh.

use std::collections::BTreeMap;

use mirage_compiler::program::Tile;
use mirage_testing::{Choice, Model, SIZES, Sizes, llama3, planned, qwen3, target};

use super::*;

/// Takes the streams apart by [`Program::for_each_tile`] and compares with the checkpoint.
fn check(model: &Model, program: &Program) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let weights = HostWeights::pack(program, &checkpoint).unwrap();
    let mut left: BTreeMap<(String, usize, usize), bf16> = BTreeMap::new();
    for weight in &program.weights {
        let [rows, columns] = weight.shape[..] else {
            continue;
        };
        for layer in 0..if weight.name.contains(LAYER) {
            program.layers
        } else {
            1
        } {
            let name = weight.name.replace(LAYER, &layer.to_string());
            let tensor = checkpoint.tensor(&name).unwrap();
            let mut values = vec![bf16::ZERO; columns];
            for row in 0..rows {
                tensor.read_bf16(row, 0, &mut values).unwrap();
                let elements = values.iter().enumerate();
                left.extend(elements.map(|(column, v)| ((name.clone(), row, column), *v)));
            }
        }
    }
    // An untied table is no part of the streams.
    let table = &program.weights[program.embedding.0 as usize].name;
    let tied = program.head.parts[0].0 == program.embedding;
    assert_eq!(weights.stream_offsets.len(), program.mesh.ctas + 1);
    for cta in 0..program.mesh.ctas {
        let mut at = weights.stream_offsets[cta] as usize;
        program.for_each_tile(
            cta,
            |Tile {
                 linear,
                 layer,
                 row,
                 k,
             }| {
                let linear = linear.map_or(&program.head, |index| &program.linears[index]);
                for element in 0..TILE * TILE {
                    let (r, c) = Linear::fragment(element);
                    let bytes = [weights.streams[at], weights.streams[at + 1]];
                    at += 2;
                    let value = bf16::from_le_bytes(bytes);
                    match linear.source_row(row * TILE + r) {
                        None => assert_eq!(value, bf16::ZERO, "padding"),
                        Some(source) => {
                            let name = &program.weights[source.weight.0 as usize].name;
                            let name = name.replace(LAYER, &layer.to_string());
                            let key = (name, source.row, k * TILE + c);
                            assert_eq!(left.remove(&key), Some(value), "{key:?}");
                        }
                    }
                }
            },
        );
        assert_eq!(at, weights.stream_offsets[cta + 1] as usize);
    }
    assert!(
        left.keys().all(|(name, ..)| name == table && !tied),
        "{} elements are left",
        left.len()
    );
    let rows = program.vocab * program.hidden;
    assert_eq!(weights.embedding.len(), rows);
    let tensor = checkpoint.tensor(table).unwrap();
    let bytes: Vec<u8> = weights
        .embedding
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    assert_eq!(bytes, tensor.bytes());
}

#[test]
fn every_element_is_packed_once() {
    let tied = qwen3(SIZES);
    let untied = llama3(Sizes {
        tied: false,
        ..SIZES
    });
    for model in [&tied, &untied] {
        for sms in [1, 3, 132] {
            check(model, &planned(model, &target(sms, 1, 64)));
        }
    }
    for choice in Choice::all() {
        check(&tied, &choice.program(&tied, 2, 64));
    }
}

#[test]
fn norms_lie_where_the_program_says() {
    let model = qwen3(SIZES);
    let program = planned(&model, &target(4, 1, 64));
    let checkpoint = Checkpoint::open(&model).unwrap();
    let mut norms = vec![bf16::ONE; program.norms.len];
    Packer::new(&program, &checkpoint)
        .unwrap()
        .pack_norms(&mut norms)
        .unwrap();
    let check = |name: &str, at: usize| {
        let tensor = checkpoint.tensor(name).unwrap();
        let mut want = vec![bf16::ZERO; tensor.columns()];
        tensor.read_bf16(0, 0, &mut want).unwrap();
        assert_eq!(norms[at..at + want.len()], want, "{name}");
    };
    let qkv = program.linears[0].norm.unwrap();
    check("model.layers.0.input_layernorm.weight", qkv.gamma_at);
    check(
        "model.layers.1.input_layernorm.weight",
        qkv.gamma_at + qkv.gamma_stride,
    );
    let k = program.attention.k_norm.unwrap();
    check(
        "model.layers.1.self_attn.k_norm.weight",
        k.gamma_at + k.gamma_stride,
    );
    check("model.norm.weight", program.head.norm.unwrap().gamma_at);
}

#[test]
fn angles_are_exact() {
    let model = qwen3(SIZES);
    let program = planned(&model, &target(4, 1, 64));
    let rope = rope_table(&program);
    assert_eq!(rope.len(), 64 * 32);
    assert_eq!(rope[0], [1.0, 0.0]);
    // Pair 0 turns by one radian a position.
    assert_eq!(rope[63 * 32], [63f64.cos() as f32, 63f64.sin() as f32]);
}

#[test]
fn other_formats_are_rounded() {
    let model = qwen3(SIZES);
    let program = planned(&model, &target(4, 1, 64));
    let checkpoint = Checkpoint::open(&model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // The same numbers in f32: bf16 to f32 and back changes nothing.
    let tensors: Vec<_> = checkpoint
        .names()
        .map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            let widen = |b: &[u8; 2]| bf16::from_le_bytes(*b).to_f32().to_le_bytes();
            let bytes: Vec<u8> = tensor
                .bytes()
                .as_chunks()
                .0
                .iter()
                .flat_map(widen)
                .collect();
            (name, tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let wide = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        HostWeights::pack(&program, &wide).unwrap(),
        HostWeights::pack(&program, &checkpoint).unwrap()
    );
}

#[test]
fn bad_input_is_named() {
    let model = qwen3(SIZES);
    let wider = qwen3(Sizes { ffn: 128, ..SIZES });
    let untied = qwen3(Sizes {
        tied: false,
        ..SIZES
    });
    let program = planned(&model, &target(4, 1, 64));
    let check = |program: &Program, model: &Model, expect: &str| {
        let error = HostWeights::pack(program, &Checkpoint::open(model).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(&program, &wider, "mlp");
    check(
        &planned(&untied, &target(4, 1, 64)),
        &model,
        "lm_head.weight",
    );
    let checkpoint = Checkpoint::open(&model).unwrap();
    let packer = Packer::new(&program, &checkpoint).unwrap();
    let error = packer
        .pack_stream(0, &mut [0; 512])
        .unwrap_err()
        .to_string();
    assert!(error.contains("but the buffer given has 512"), "{error}");
    let error = packer
        .pack_embedding(74, &mut [bf16::ZERO; 160])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("takes 80 elements, but the buffer given has 160"),
        "{error}"
    );
}
