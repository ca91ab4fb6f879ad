//! The benchmark of mirage: the megakernel against baselines, measured so that the numbers can be believed.
//!
//! From flags to files: [`cli`] and [`app`]; the model and prompts of a run: [`model`], [`prompts`], [`workload`]; the engines
//! behind one trait: [`side`], [`sides`]; the measurement: [`harness`] with its correctness [`gate`]; what becomes of it:
//! [`mod@derive`], [`stats`], [`results`]; what people read: [`report`], [`compare`], [`external`].

pub mod app;
pub mod category;
pub mod cli;
pub mod compare;
pub mod derive;
pub mod device;
pub mod external;
pub mod gate;
pub mod harness;
pub mod ladder;
pub mod model;
pub mod outputs;
pub mod progress;
pub mod prompts;
pub mod report;
pub mod results;
pub mod side;
pub mod sides;
pub mod stats;
pub mod workload;
