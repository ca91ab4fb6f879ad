//! The benchmark of mirage: the megakernel against baselines, measured so that the numbers can be believed.

pub mod derive;
pub mod gate;
pub mod harness;
pub mod prompts;
pub mod results;
pub mod side;
pub mod stats;
pub mod workload;
