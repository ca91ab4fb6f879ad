//! The rules of a well-formed typed graph.

use std::collections::BTreeSet;

use super::{TypedGraph, TypedNode, ValueRef};
use crate::diagnostics::Violation;
use crate::ops::{Type, TypedOp};

fn violation(place: &str, rule: impl Into<String>) -> Violation {
    Violation {
        stage: "typed graph",
        place: place.to_owned(),
        rule: rule.into(),
    }
}

impl TypedGraph {
    /// Checks the rules at the head of the module.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn verify(&self) -> Result<(), Violation> {
        self.verify_section(&self.before, ValueRef::Tokens, &Type::Token)?;
        self.verify_section(&self.layer, ValueRef::State, &self.state)?;
        self.verify_section(&self.after, ValueRef::State, &self.state)?;
        for (nodes, index, end) in [
            (&self.before, self.first, "first"),
            (&self.layer, self.next, "next"),
        ] {
            let ty = nodes.get(index).map(|node| node.op.output());
            if ty.as_ref() != Some(&self.state) {
                return Err(violation(
                    end,
                    format!("the state is {} (rule 2)", self.state),
                ));
            }
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = self
            .weights
            .iter()
            .find(|weight| !names.insert(&weight.name))
        {
            return Err(violation(&twice.name, "a weight's name is unique (rule 3)"));
        }
        match self.after.last().map(|node| &node.op) {
            Some(TypedOp::Sample(_)) => Ok(()),
            _ => Err(violation("after", "the last node is a Sample (rule 4)")),
        }
    }

    fn verify_section(
        &self,
        nodes: &[TypedNode],
        given: ValueRef,
        given_type: &Type,
    ) -> Result<(), Violation> {
        for (at, node) in nodes.iter().enumerate() {
            let wanted = node.op.inputs();
            if wanted.len() != node.inputs.len() {
                return Err(violation(
                    &node.id,
                    format!("it takes {} inputs (rule 2)", wanted.len()),
                ));
            }
            for (input, wanted) in node.inputs.iter().zip(&wanted) {
                let ty = match input {
                    ValueRef::Node(maker) if *maker < at => nodes[*maker].op.output(),
                    other if *other == given => given_type.clone(),
                    other => {
                        return Err(violation(
                            &node.id,
                            format!("it cannot read {other:?} (rule 1)"),
                        ));
                    }
                };
                if ty != *wanted {
                    return Err(violation(
                        &node.id,
                        format!("it takes {wanted} but reads {ty} (rule 2)"),
                    ));
                }
            }
            let shape = node
                .weight
                .map(|index| self.weights.get(index).map(|weight| weight.shape.clone()));
            if shape != node.op.weight_shape().map(Some) {
                return Err(violation(
                    &node.id,
                    "its weight has the operator's shape (rule 3)",
                ));
            }
        }
        Ok(())
    }
}
