//! What the oracle needs of mirage: teacher-forced logits in `oracle/`'s raw format, and times.
//!
//! ```text
//! cargo run --release -p mirage-runtime --example oracle -- score GRAPH MODEL BATCH MAX_SEQ PROMPTS.json OUT.f32
//! cargo run --release -p mirage-runtime --example oracle -- score-cpu GRAPH MODEL BATCH MAX_SEQ PROMPTS.json OUT.f32
//! cargo run --release -p mirage-runtime --example oracle -- steps GRAPH MODEL BATCH MAX_SEQ POSITION
//! cargo run --release -p mirage-runtime --example oracle -- ttft GRAPH MODEL BATCH MAX_SEQ LENGTH...
//! cargo run --release -p mirage-runtime --example oracle -- tokens GRAPH MODEL BATCH MAX_SEQ NEW_TOKENS
//! cargo run --release -p mirage-runtime --example oracle -- timeline GRAPH MODEL BATCH MAX_SEQ POSITION [TEMPERATURE]
//! cargo run --release -p mirage-runtime --example oracle -- load GRAPH MODEL BATCH MAX_SEQ [BUFFERS MB]
//! ```
//!
//! With `--profile FILE` ahead of the command, plans are made with what `mirage-calibrate` measured.
//!
//! `score` runs the prompts `BATCH` at a time; `oracle/check.py` judges the file. `score-cpu` does the same with the CPU
//! executor; all others need a GPU. `steps` prints the median time of a
//! decode step at a position over five runs, greedy and sampled; `ttft` the time to the first token of prompts of some
//! lengths; `timeline` what each part of a step takes, greedy or sampled, and each phase beside its prediction. `tokens` makes one generation of a full batch of prompts
//! of mixed lengths and checks that it repeats, alone and together: one launch each, for a profiler or a sanitizer. `load`
//! measures loading the weights from files in the page cache, through so many staging buffers of so many megabytes, a thread each.

mod load;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use mirage_compiler::arch::GpuModel;
use mirage_compiler::cost::Machine;
use mirage_compiler::driver::{self, Compilation};
use mirage_compiler::plan::Target;
use mirage_compiler::profile::Profile;
use mirage_compiler::typed::ModelConfig;
use mirage_runtime::checkpoint::Checkpoint;
use mirage_runtime::cpu::CpuModel;
use mirage_runtime::generate::{Executor, GenerateRequest};
use mirage_runtime::gpu::Gpu;
use mirage_runtime::megakernel::timeline::Comparison;
use mirage_runtime::megakernel::{Megakernel, Staging};
use mirage_runtime::sampler::SamplingParams;

const USAGE: &str = "[--profile FILE] score|score-cpu|steps|ttft|timeline|tokens|load GRAPH MODEL BATCH MAX_SEQ (PROMPTS.json OUT.f32 | POSITION [TEMPERATURE] | LENGTH... | NEW_TOKENS | [BUFFERS MB])";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut profile = None;
    if let ["--profile", file, ..] = args[..] {
        profile = Some(Profile::parse(&fs::read_to_string(file)?, file)?);
        args.drain(..2);
    }
    let gpu_model = |gpu: &Gpu| -> Result<GpuModel, Box<dyn Error>> {
        let model = gpu.properties().model()?;
        Ok(match &profile {
            Some(profile) => profile.apply(model)?,
            None => model,
        })
    };
    let (&[command, graph, model, batch, max_seq], rest) = args.split_first_chunk().ok_or(USAGE)?;
    let batch: usize = batch.parse()?;
    let max_seq: usize = max_seq.parse()?;
    let model = Path::new(model);
    let on_gpu = || -> Result<Megakernel, Box<dyn Error>> {
        let gpu = Gpu::open(0)?;
        let compiled = compile(graph, model, gpu_model(&gpu)?, batch, max_seq)?;
        load(&gpu, compiled, model)
    };
    match (command, rest) {
        ("score", &[prompts, out]) => score(&mut on_gpu()?, batch, prompts, out),
        ("score-cpu", &[prompts, out]) => {
            let compiled = compile(graph, model, GpuModel::cpu(), batch, max_seq)?;
            let mut cpu = CpuModel::load(compiled.program, &Checkpoint::open(model)?)?;
            score(&mut cpu, batch, prompts, out)
        }
        ("steps", &[position]) => steps(&mut on_gpu()?, batch, position.parse()?),
        ("ttft", lengths @ &[_, ..]) => {
            let lengths: Result<Vec<usize>, _> = lengths.iter().map(|n| n.parse()).collect();
            first_tokens(&mut on_gpu()?, batch, &lengths?)
        }
        ("timeline", &[position, ref temperature @ ..]) => {
            let temperature = match temperature {
                [] => 0.0,
                [temperature] => temperature.parse()?,
                _ => return Err(USAGE.into()),
            };
            let gpu = Gpu::open(0)?;
            let mut compiled = compile(graph, model, gpu_model(&gpu)?, batch, max_seq)?;
            compiled.source = compiled.source.traced();
            let machine = Machine::of(&compiled.target.gpu);
            let mut kernel = load(&gpu, compiled, model)?;
            kernel.record_timeline()?;
            timeline(&mut kernel, &machine, batch, position.parse()?, temperature)
        }
        ("load", sizes @ (&[] | &[_, _])) => {
            let mut staging = Staging::default();
            if let &[buffers, megabytes] = sizes {
                staging.buffers = buffers.parse()?;
                staging.bytes = megabytes.parse::<usize>()? << 20;
            }
            let gpu = Gpu::open(0)?;
            let compiled = compile(graph, model, gpu_model(&gpu)?, batch, max_seq)?;
            load::load(&gpu, &compiled.build()?.artifact, model, staging)
        }
        ("tokens", &[new_tokens]) => tokens(&mut on_gpu()?, batch, new_tokens.parse()?),
        _ => Err(USAGE.into()),
    }
}

fn compile(
    graph: &str,
    model: &Path,
    gpu: GpuModel,
    batch: usize,
    max_seq: usize,
) -> Result<Compilation, Box<dyn Error>> {
    let target = Target {
        gpu,
        batch,
        max_seq,
    };
    let config = model.join("config.json");
    let config = ModelConfig::parse(&fs::read_to_string(&config)?, &config.to_string_lossy())?;
    Ok(driver::compile(
        &fs::read_to_string(graph)?,
        graph,
        &config,
        &target,
    )?)
}

fn load(gpu: &Gpu, compiled: Compilation, model: &Path) -> Result<Megakernel, Box<dyn Error>> {
    let batch = compiled.target.batch;
    let begin = Instant::now();
    let artifact = compiled.build()?.artifact;
    let built = begin.elapsed();
    let checkpoint = Checkpoint::open(model)?;
    let begin = Instant::now();
    let kernel = Megakernel::load(
        gpu,
        compiled.program,
        &artifact.cubin,
        &checkpoint,
        &mut |_, _| {},
    )?;
    println!(
        "{}: batch {batch}, cubin in {built:.1?}, weights in {:.1?}",
        gpu.name(),
        begin.elapsed()
    );
    Ok(kernel)
}

fn score(
    executor: &mut dyn Executor,
    batch: usize,
    prompts: &str,
    out: &str,
) -> Result<(), Box<dyn Error>> {
    let prompts: Vec<Vec<u32>> = serde_json::from_str(&fs::read_to_string(prompts)?)?;
    let mut out = BufWriter::new(File::create(out)?);
    for sequences in prompts.chunks(batch) {
        for logits in executor.score(sequences)? {
            out.write_all(bytemuck::cast_slice(&logits.values))?;
        }
    }
    Ok(out.flush()?)
}

/// Tokens that differ from sequence to sequence.
fn prompt(kernel: &Megakernel, sequence: usize, length: usize) -> Vec<u32> {
    let vocab = kernel.program().vocab;
    (0..length)
        .map(|i| ((i * 7919 + sequence * 104_729 + 13) % vocab) as u32)
        .collect()
}

/// Greedy at temperature 0, else with top-p 0.95.
fn sampling(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        top_p: if temperature > 0.0 { 0.95 } else { 1.0 },
        seed: 1,
        ..SamplingParams::default()
    }
}

/// The difference of two generations of different lengths: prefill and launch fall out of it.
fn steps(kernel: &mut Megakernel, batch: usize, position: usize) -> Result<(), Box<dyn Error>> {
    const FEW: usize = 16;
    const MANY: usize = 80;
    for temperature in [0.0, 0.8] {
        let sampling = sampling(temperature);
        let mut time = |new_tokens: usize| -> Result<f32, Box<dyn Error>> {
            let requests: Vec<GenerateRequest> = (0u32..)
                .take(batch)
                .map(|stream| GenerateRequest {
                    sampling,
                    stream,
                    ..GenerateRequest::greedy(prompt(kernel, stream as usize, position), new_tokens)
                })
                .collect();
            let made = kernel.generate_all(&requests)?;
            if made.iter().any(|text| text.tokens.len() != new_tokens) {
                return Err(format!(
                    "{new_tokens} tokens after position {position} pass the context"
                )
                .into());
            }
            Ok(kernel.kernel_ms().unwrap_or(0.0))
        };
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push((time(MANY)? - time(FEW)?) / (MANY - FEW) as f32 * 1e3);
        }
        times.sort_by(f32::total_cmp);
        println!(
            "batch {batch}, position {position}, temperature {temperature}: {:.1} us a step (min {:.1}, max {:.1})",
            times[2], times[0], times[4]
        );
    }
    Ok(())
}

/// Generations of one token for a batch of prompts of the same length: the kernel from its start to its end, which is all
/// prefill steps and one choice of tokens. What the host does before the launch is not counted.
fn first_tokens(
    kernel: &mut Megakernel,
    batch: usize,
    lengths: &[usize],
) -> Result<(), Box<dyn Error>> {
    const TIMES: usize = 9;
    for &length in lengths {
        let requests: Vec<GenerateRequest> = (0..batch)
            .map(|sequence| GenerateRequest::greedy(prompt(kernel, sequence, length), 1))
            .collect();
        let mut times = Vec::new();
        for _ in 0..TIMES {
            kernel.generate_all(&requests)?;
            times.push(kernel.kernel_ms().unwrap_or(0.0) * 1e3);
        }
        times.sort_by(f32::total_cmp);
        println!(
            "batch {batch}, prompts of {length}: first token after {:.1} us (min {:.1}, max {:.1})",
            times[TIMES / 2],
            times[0],
            times[TIMES - 1]
        );
    }
    Ok(())
}

/// Sixteen decode steps, part by part, and by phase beside the prediction.
fn timeline(
    kernel: &mut Megakernel,
    machine: &Machine,
    batch: usize,
    position: usize,
    temperature: f32,
) -> Result<(), Box<dyn Error>> {
    const STEPS: usize = 16;
    let requests: Vec<GenerateRequest> = (0u32..)
        .take(batch)
        .map(|stream| GenerateRequest {
            sampling: sampling(temperature),
            stream,
            ..GenerateRequest::greedy(prompt(kernel, stream as usize, position), STEPS)
        })
        .collect();
    kernel.generate_all(&requests)?;
    kernel.generate_all(&requests)?;
    let timeline = kernel.timeline()?;
    print!("{timeline}");
    let clock = timeline.clock_mhz(kernel.kernel_ms().unwrap_or(0.0));
    let (clock, depth) = (clock.unwrap_or(machine.clock_mhz), position + STEPS / 2);
    let compared = Comparison::new(&timeline, kernel.program(), machine, depth, clock);
    print!("{compared}");
    Ok(())
}

fn tokens(kernel: &mut Megakernel, batch: usize, new_tokens: usize) -> Result<(), Box<dyn Error>> {
    let requests: Vec<GenerateRequest> = (0u32..)
        .take(batch)
        .map(|stream| {
            let length = 1 + stream as usize * 11 % 48;
            let mut request =
                GenerateRequest::greedy(prompt(kernel, stream as usize, length), new_tokens);
            request.stream = stream;
            if stream % 2 == 1 {
                request.sampling = SamplingParams {
                    temperature: 0.8,
                    top_k: 50,
                    top_p: 0.9,
                    seed: 7,
                };
            }
            request
        })
        .collect();
    let together = kernel.generate_all(&requests)?;
    if kernel.generate_all(&requests)? != together {
        return Err("two runs of the same batch differ".into());
    }
    for (request, expect) in requests.iter().zip(&together) {
        if kernel.generate_all(std::slice::from_ref(request))?[0] != *expect {
            return Err("a sequence's tokens depend on its batch".into());
        }
    }
    let launches = 2 + requests.len();
    println!(
        "{new_tokens} tokens of {batch} sequences, bit for bit the same in {launches} generations"
    );
    Ok(())
}
