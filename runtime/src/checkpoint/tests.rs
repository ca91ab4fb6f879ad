//! Checkpoints made in temporary folders: what opens and reads right, and every error once.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;

/// A tensor to write: name, format, shape, little-endian bytes.
type Fixture = (&'static str, safetensors::Dtype, Vec<usize>, Vec<u8>);

fn f32_tensor(name: &'static str, shape: &[usize], values: &[f32]) -> Fixture {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name, safetensors::Dtype::F32, shape.to_vec(), bytes)
}

fn bf16_tensor(name: &'static str, shape: &[usize], values: &[f32]) -> Fixture {
    let bytes = values
        .iter()
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect();
    (name, safetensors::Dtype::BF16, shape.to_vec(), bytes)
}

fn f16_tensor(name: &'static str, shape: &[usize], values: &[f32]) -> Fixture {
    let bytes = values
        .iter()
        .flat_map(|v| f16::from_f32(*v).to_le_bytes())
        .collect();
    (name, safetensors::Dtype::F16, shape.to_vec(), bytes)
}

fn safetensors_bytes(tensors: &[Fixture]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// A folder with a small config.json and these tensors as model.safetensors.
fn single(tensors: &[Fixture]) -> TempDir {
    folder(&[
        ("config.json", b"{}"),
        ("model.safetensors", &safetensors_bytes(tensors)),
    ])
}

/// The error of opening must read as `expect`, in which `DIR` stands for the folder.
fn check_open_error(dir: &Path, expect: &str) {
    let error = Checkpoint::open(dir).expect_err("opening should fail");
    check_message(dir, &error, expect);
}

fn check_message(dir: &Path, error: &CheckpointError, expect: &str) {
    assert_eq!(
        error.to_string().replace(&dir.display().to_string(), "DIR"),
        expect
    );
}

fn row_f32(tensor: &Tensor<'_>, row: usize) -> Vec<f32> {
    let mut out = vec![0.0; tensor.columns()];
    tensor.read_f32(row, 0, &mut out).unwrap();
    out
}

#[test]
fn reads_every_dtype_as_f32_and_bf16() {
    // 1 + 2^-8 lies midway between two bf16 values and goes to the even one, 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6.
    let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -2.5, 0.0];
    let rounded = [1.0, 1.015_625, -2.5, 0.0];
    let dir = single(&[
        f32_tensor("full", &[2, 2], &values),
        f16_tensor("half", &[2, 2], &values),
        bf16_tensor("brain", &[2, 2], &rounded),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (name, dtype, exact) in [
        ("full", Dtype::F32, values),
        ("half", Dtype::F16, values),
        ("brain", Dtype::Bf16, rounded),
    ] {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(
            (tensor.dtype(), tensor.shape(), tensor.rows()),
            (dtype, &[2, 2][..], 2),
            "{name}"
        );
        assert_eq!(
            [row_f32(&tensor, 0), row_f32(&tensor, 1)].concat(),
            exact,
            "{name}"
        );
        for row in 0..2 {
            let mut out = [bf16::ZERO; 2];
            tensor.read_bf16(row, 0, &mut out).unwrap();
            assert_eq!(out.map(f32::from), rounded[2 * row..][..2], "{name}");
        }
    }
}

#[test]
fn reads_part_of_a_row_and_refuses_more() {
    let dir = single(&[f32_tensor("w", &[2, 3], &[0., 1., 2., 3., 4., 5.])]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensor = checkpoint.tensor("w").unwrap();
    let mut out = [0.0; 2];
    tensor.read_f32(1, 1, &mut out).unwrap();
    assert_eq!(out, [4., 5.]);

    let error = tensor.read_f32(1, 2, &mut out).unwrap_err();
    check_message(
        dir.path(),
        &error,
        "DIR/model.safetensors: row 1, columns 2..4 of tensor w asked for, but it has 2 rows of 3; check its shape before reading",
    );
    assert!(
        tensor.read_bf16(2, 0, &mut [bf16::ZERO]).is_err(),
        "no third row"
    );
    assert!(
        tensor.read_f32(0, usize::MAX, &mut out).is_err(),
        "no overflow"
    );
    assert_eq!(out, [4., 5.], "untouched on error");
}

#[test]
fn vectors_are_one_row_and_scalars_one_element() {
    let dir = single(&[
        f32_tensor("vector", &[3], &[1., 2., 3.]),
        f32_tensor("scalar", &[], &[7.]),
        f32_tensor("cube", &[2, 1, 2], &[1., 2., 3., 4.]),
        f32_tensor("empty", &[2, 0], &[]),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let size = |name| {
        let tensor = checkpoint.tensor(name).unwrap();
        (tensor.rows(), tensor.columns())
    };
    assert_eq!(size("vector"), (1, 3));
    assert_eq!(size("scalar"), (1, 1));
    assert_eq!(size("cube"), (2, 2));
    assert_eq!(size("empty"), (0, 0));
    assert_eq!(row_f32(&checkpoint.tensor("cube").unwrap(), 1), [3., 4.]);
}

const INDEX_OF_TWO: &str = r#"{
    "metadata": {"total_size": 16},
    "weight_map": {"embed.weight": "model-1-of-2.safetensors", "lm_head.weight": "model-2-of-2.safetensors"}
}"#;

#[test]
fn reads_shards_untied() {
    let first = safetensors_bytes(&[bf16_tensor("embed.weight", &[1, 2], &[1., 2.])]);
    let second = safetensors_bytes(&[
        f32_tensor("lm_head.weight", &[1, 2], &[3., 4.]),
        f32_tensor("not.in.the.index", &[1], &[0.]),
    ]);
    let dir = folder(&[
        ("config.json", br#"{"tie_word_embeddings": false}"#),
        ("model.safetensors.index.json", INDEX_OF_TWO.as_bytes()),
        ("model-1-of-2.safetensors", &first),
        ("model-2-of-2.safetensors", &second),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config()["tie_word_embeddings"], false);
    assert_eq!(
        checkpoint.names().collect::<Vec<_>>(),
        ["embed.weight", "lm_head.weight"]
    );
    assert_eq!(checkpoint.size(), 4 + 8);
    assert!(!checkpoint.contains("not.in.the.index"));
    assert_eq!(
        row_f32(&checkpoint.tensor("embed.weight").unwrap(), 0),
        [1., 2.]
    );
    let head = checkpoint.tensor("lm_head.weight").unwrap();
    assert_eq!(row_f32(&head, 0), [3., 4.]);
    assert_eq!(head.file(), dir.path().join("model-2-of-2.safetensors"));
}

#[test]
fn fingerprint_follows_contents_not_place() {
    let fingerprint = |value| {
        let dir = single(&[f32_tensor("w", &[1], &[value])]);
        Checkpoint::open(dir.path()).unwrap().fingerprint()
    };
    assert_eq!(fingerprint(1.0), fingerprint(1.0));
    assert_ne!(fingerprint(1.0), fingerprint(2.0));
}

#[test]
fn missing_pieces() {
    check_open_error(
        &PathBuf::from("/no/such/model"),
        "DIR: no such folder; give the folder that holds config.json and the safetensors files",
    );
    let dir = folder(&[]);
    check_open_error(
        dir.path(),
        "DIR: the folder has no config.json; copy it from where the weights came from",
    );
    let dir = folder(&[("config.json", b"{}")]);
    check_open_error(
        dir.path(),
        "DIR: the folder has neither model.safetensors nor model.safetensors.index.json; download the weights in safetensors format",
    );
    let dir = folder(&[("config.json", b"{}"), ("pytorch_model.bin", b"")]);
    check_open_error(
        dir.path(),
        "DIR: the folder has neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin is a pickle, which we do not load: convert it with transformers' save_pretrained",
    );
    let dir = folder(&[]);
    fs::create_dir(dir.path().join("config.json")).unwrap();
    check_open_error(
        dir.path(),
        "DIR/config.json: not a regular file; put the file itself there, as it was downloaded",
    );
}

#[test]
fn malformed_config() {
    let dir = folder(&[("config.json", b"{\n  \"hidden_size\": }")]);
    check_open_error(
        dir.path(),
        "DIR/config.json: not the JSON it should be (expected value at line 2 column 18); mend the file or download it again",
    );
    let dir = folder(&[("config.json", b"[]")]);
    check_open_error(
        dir.path(),
        "DIR/config.json: not the JSON it should be (invalid type: sequence, expected a map at line 1 column 0); mend the file or download it again",
    );
}

/// Opening a checkpoint whose model.safetensors is `bytes` must fail with `expect` after the file's name.
fn check_bad_weights(bytes: &[u8], expect: &str) {
    let dir = folder(&[("config.json", b"{}"), ("model.safetensors", bytes)]);
    check_open_error(dir.path(), &format!("DIR/model.safetensors: {expect}"));
}

#[test]
fn broken_safetensors() {
    let good = safetensors_bytes(&[f32_tensor("w", &[4], &[0.; 4])]);
    let header = good.len() - 16 - 8;

    check_bad_weights(b"", "truncated: 0 bytes of 8; download it again");
    check_bad_weights(&good[..5], "truncated: 5 bytes of 8; download it again");
    check_bad_weights(
        &good[..28],
        &format!(
            "the first 8 bytes claim a header of {header} bytes, but 20 are possible here; the file is truncated or not safetensors: download it again"
        ),
    );
    check_bad_weights(
        &good[..good.len() - 1],
        &format!(
            "truncated: {} bytes of {}; download it again",
            good.len() - 1,
            good.len()
        ),
    );
    check_bad_weights(
        &[&good[..], b"more"].concat(),
        &format!(
            "{} bytes, but its header accounts for {} only; write it again, or download it again",
            good.len() + 4,
            good.len()
        ),
    );
    check_bad_weights(
        &[0xff; 16],
        "the first 8 bytes claim a header of 18446744073709551615 bytes, but 8 are possible here; the file is truncated or not safetensors: download it again",
    );
    check_bad_weights(
        b"\x02\0\0\0\0\0\0\0{]",
        "the safetensors header is wrong (invalid JSON in header: key must be a string at line 1 column 2); write it again, or download it again",
    );
    check_bad_weights(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer, not weights; run `git lfs pull` in its folder",
    );
}

#[test]
fn header_that_overflows_or_overlaps() {
    let with_header = |json: &str| {
        [
            &(json.len() as u64).to_le_bytes(),
            json.as_bytes(),
            &[0; 4][..],
        ]
        .concat()
    };
    check_bad_weights(
        &with_header(
            r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
        ),
        "the safetensors header is wrong (overflow computing buffer size from shape and/or element type); write it again, or download it again",
    );
    check_bad_weights(
        &with_header(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#),
        "the safetensors header is wrong (invalid offset for tensor `w`); write it again, or download it again",
    );
}

/// Opening a sharded checkpoint with this index and one good shard, `a.safetensors` with tensor `w`, must fail so.
fn check_bad_index(index: &str, expect: &str) {
    let shard = safetensors_bytes(&[f32_tensor("w", &[1], &[0.])]);
    let dir = folder(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("a.safetensors", &shard),
    ]);
    check_open_error(dir.path(), expect);
}

#[test]
fn broken_index() {
    check_bad_index(
        r#"{"weight_map": {}}"#,
        "DIR/model.safetensors.index.json: weight_map is empty; download the index again",
    );
    check_bad_index(
        "{}",
        "DIR/model.safetensors.index.json: not the JSON it should be (missing field `weight_map` at line 1 column 2); mend the file or download it again",
    );
    check_bad_index(
        r#"{"weight_map": {"v": "b.safetensors", "x": "b.safetensors", "w": "a.safetensors"}}"#,
        "DIR/model.safetensors.index.json: the shard b.safetensors is not there, and 2 tensor(s) are in it; download it into the same folder",
    );
    check_bad_index(
        r#"{"weight_map": {"v": "a.safetensors"}}"#,
        "DIR/a.safetensors: no tensor v, though DIR/model.safetensors.index.json says so; download both again, they must be of one revision",
    );
    for outside in ["../a.safetensors", "/a.safetensors", "", "./../a", r"..\\a"] {
        check_bad_index(
            &format!(r#"{{"weight_map": {{"w": "{outside}"}}}}"#),
            &format!(
                "DIR/model.safetensors.index.json: weight_map names the file {:?}, but shards must lie in the model's folder: use a plain file name",
                outside.replace(r"\\", r"\")
            ),
        );
    }
}

#[test]
fn unusable_tensors() {
    let dir = single(&[
        f32_tensor("model.layers.0.mlp.up_proj.weight", &[2, 3], &[0.; 6]),
        ("quantized", safetensors::Dtype::I8, vec![1], vec![0]),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let message = |error: &CheckpointError, expect: &str| check_message(dir.path(), error, expect);
    message(
        &checkpoint
            .tensor("model.layers.0.mlp.upproj.weight")
            .unwrap_err(),
        "DIR: the checkpoint has no tensor model.layers.0.mlp.upproj.weight (did you mean model.layers.0.mlp.up_proj.weight?); check that model and graph belong together",
    );
    message(
        &checkpoint.tensor("lm_head.weight").unwrap_err(),
        "DIR: the checkpoint has no tensor lm_head.weight; check that model and graph belong together",
    );
    message(
        &checkpoint.tensor("quantized").unwrap_err(),
        "DIR/model.safetensors: tensor quantized is I8, and only BF16, F16 and F32 are read; use an unquantized checkpoint, or convert it",
    );
    let tensor = checkpoint
        .tensor("model.layers.0.mlp.up_proj.weight")
        .unwrap();
    tensor.expect_shape(&[2, 3]).unwrap();
    message(
        &tensor.expect_shape(&[3, 2]).unwrap_err(),
        "DIR/model.safetensors: tensor model.layers.0.mlp.up_proj.weight has shape [2, 3], but [3, 2] is expected; check that config.json belongs to these weights",
    );
}
