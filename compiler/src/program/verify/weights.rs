//! The checkpoint's tensors: every place names one of the shape that it takes, and every tensor has a place.

use super::{Rule, Violation, ensure};
use crate::fuse::WeightId;
use crate::graph::LAYER;
use crate::program::Program;

pub(super) fn check(program: &Program) -> Result<(), Violation> {
    let mut places = Places {
        program,
        named: vec![false; program.weights.len()],
    };
    let table = vec![program.vocab, program.hidden];
    places.name("the embedding", program.embedding, table, false)?;
    for linear in &program.linears {
        for &(weight, rows) in &linear.parts {
            places.name(&linear.name, weight, vec![rows, linear.columns], true)?;
        }
    }
    let head = &program.head;
    for &(weight, rows) in &head.parts {
        places.name(&head.name, weight, vec![rows, head.columns], false)?;
    }
    for linear in &program.linears {
        if let Some(norm) = linear.norm {
            places.name(&linear.name, norm.gamma, vec![linear.columns], true)?;
        }
    }
    let a = &program.attention;
    for norm in [a.q_norm, a.k_norm].into_iter().flatten() {
        places.name(&a.name, norm.gamma, vec![a.head_dim], true)?;
    }
    if let Some(norm) = head.norm {
        places.name(&head.name, norm.gamma, vec![program.hidden], false)?;
    }
    let forgotten = places.named.iter().position(|named| !named);
    let name = forgotten.map_or("", |at| &program.weights[at].name);
    ensure(forgotten.is_none(), Rule::Weights, name, || {
        "nothing reads it".to_owned()
    })
}

struct Places<'a> {
    program: &'a Program,
    /// By weight.
    named: Vec<bool>,
}

impl Places<'_> {
    /// A place that takes a tensor of this shape, of each layer or only one.
    fn name(
        &mut self,
        place: &str,
        weight: WeightId,
        shape: Vec<usize>,
        of_layers: bool,
    ) -> Result<(), Violation> {
        let at = weight.0 as usize;
        let Some(known) = self.program.weights.get(at) else {
            return ensure(false, Rule::Weights, place, || {
                format!("there is no tensor {at}")
            });
        };
        let fits = known.shape == shape && known.name.contains(LAYER) == of_layers;
        ensure(fits, Rule::Weights, place, || {
            let whose = if of_layers { "each layer" } else { "the model" };
            format!(
                "{} of shape {:?} where one of {whose} of shape {shape:?} belongs",
                known.name, known.shape
            )
        })?;
        self.named[at] = true;
        Ok(())
    }
}
