use mirage_compiler::{arch::{Arch, GpuModel}, emit::cuda_source, fuse::FusedGraph, graph::Graph, nvrtc, plan::{Plan, Target}, typed::{ModelConfig, TypedGraph}};
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let arch: Arch = args[2].parse()?;
    let batch: usize = args[3].parse()?;
    let graph = Graph::parse(&std::fs::read_to_string(&args[1])?, &args[1])?;
    let config = match args.get(5) { Some(p) => ModelConfig::parse(&std::fs::read_to_string(p)?, p)?, None => ModelConfig::none() };
    let typed = TypedGraph::new(&graph, &config)?;
    let fused = FusedGraph::new(&typed)?;
    let t = std::time::Instant::now();
    let (plan, program) = Plan::search(&fused, &Target { gpu: GpuModel::default_for(arch), batch, max_seq: args[4].parse()? })?;
    println!("{plan}\n{program}\nsearch {:?}", t.elapsed());
    let source = cuda_source(&program, arch);
    std::fs::create_dir_all("/work/emit/h")?;
    std::fs::write("/work/emit/kernel.cu", &source.text)?;
    for (n, t) in &source.headers { std::fs::write(format!("/work/emit/h/{n}"), t)?; }
    let t = std::time::Instant::now();
    let nv = nvrtc::Nvrtc::find()?;
    let c = nv.compile(&nvrtc::Source { name: "kernel.cu".into(), text: source.text, headers: source.headers }, arch, &nvrtc::Options::default())?;
    println!("{:?} {} bytes, {:?}\n{}", t.elapsed(), c.cubin.len(), c.resources, c.log);
    Ok(())
}
