//! The programs that plans of many kinds make of a model.

use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::mesh::{Mesh, Placement, Split};
use mirage_compiler::plan::{Plan, StreamForm, Target, Transport};
use mirage_compiler::program::Program;

use crate::model::Model;

/// A target of so many SMs.
pub fn target(sms: u32, batch: usize, max_seq: usize) -> Target {
    let gpu = GpuModel {
        sms,
        ..GpuModel::default_for(Arch::Sm90a)
    };
    Target {
        gpu,
        batch,
        max_seq,
    }
}

/// The program that the planner makes.
pub fn planned(model: &Model, target: &Target) -> Program {
    Plan::search(&model.fused, target).unwrap().1
}

/// What a plan by hand decides; the planner would not choose most of these, but executors must run them all.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Groups of the mesh.
    pub groups: usize,
    /// Members of a group.
    pub members: usize,
    /// CTAs that only help with the head.
    pub helpers: usize,
    /// Placement of the linears that write the residual stream.
    pub writers: Placement,
    /// Form of the residual stream, in both kinds of steps.
    pub stream: StreamForm,
    /// Parts of attention's positions, in both kinds of steps.
    pub kv_splits: usize,
    /// Of decode steps; the writers split their columns over the groups then.
    pub replicate_below: usize,
    /// Query heads of a task of attention.
    pub heads_per_task: usize,
    /// Columns of a prefill step; at least the batch's.
    pub prefill_columns: usize,
}

impl Choice {
    /// Rows from so many columns on, where they are possible.
    fn transport(&self, columns: usize, from: usize) -> Transport {
        let possible = self.stream == StreamForm::Scattered && self.kv_splits == 1;
        if possible && columns >= from {
            Transport::Rows
        } else {
            Transport::Words
        }
    }

    /// The program of this plan.
    pub fn program(&self, model: &Model, batch: usize, max_seq: usize) -> Program {
        let gpu = GpuModel::default_for(Arch::Sm90a);
        self.program_on(gpu, model, batch, max_seq)
    }

    /// The program of this plan, on some SMs of a GPU.
    pub fn program_on(
        &self,
        gpu: GpuModel,
        model: &Model,
        batch: usize,
        max_seq: usize,
    ) -> Program {
        let (plan, target) = self.plan_on(gpu, model, batch, max_seq);
        plan.verify(&model.fused).unwrap();
        Program::new(&model.fused, &plan, &target).unwrap()
    }

    /// The plan itself, which need not be a right one.
    pub fn plan_on(
        &self,
        gpu: GpuModel,
        model: &Model,
        batch: usize,
        max_seq: usize,
    ) -> (Plan, Target) {
        let ctas = self.groups * self.members + self.helpers;
        let sms = ctas as u32;
        let target = Target {
            gpu: GpuModel { sms, ..gpu },
            batch,
            max_seq,
        };
        let (mut plan, _) = Plan::search(&model.fused, &target).unwrap();
        plan.mesh = Mesh {
            groups: self.groups,
            members: self.members,
            ctas,
        };
        let rows = Placement {
            groups: Split::Rows,
            members: Split::Rows,
        };
        // q, k and v; attention; o; gate and up; down.
        plan.placements = vec![
            Some(rows),
            None,
            Some(self.writers),
            Some(rows),
            Some(self.writers),
        ];
        plan.heads_per_task = self.heads_per_task;
        plan.prefill.columns = self.prefill_columns;
        for step in [&mut plan.prefill, &mut plan.decode] {
            step.stream = self.stream;
            step.kv_splits = self.kv_splits;
        }
        plan.prefill.transport = self.transport(self.prefill_columns, Target::ROW_COLUMNS);
        plan.decode.transport = self.transport(plan.decode.columns, Target::MAX_WORD_COLUMNS + 1);
        plan.wide = None;
        plan.decode.replicate_below = self.replicate_below;
        (plan, target)
    }

    /// Every placement of the writers with both forms of the stream, on meshes of several shapes.
    pub fn all() -> Vec<Choice> {
        let mut all = Choice::of_rows();
        for (i, writers) in Placement::ALL.into_iter().enumerate() {
            for (j, stream) in [StreamForm::Replicated, StreamForm::Scattered]
                .into_iter()
                .enumerate()
            {
                let odd = (i + j) % 2;
                let by_rows = writers.groups == Split::Rows && writers.members == Split::Rows;
                all.push(Choice {
                    groups: [2, 1][odd],
                    // A stream of five tiles has rows for five workers.
                    members: [if by_rows { 2 } else { 3 }, 5][odd],
                    helpers: [3, 0, 1][(i + 2 * j) % 3],
                    writers,
                    stream,
                    kv_splits: [1, 3, 2][(2 * i + j) % 3],
                    replicate_below: match writers.groups {
                        Split::Columns => [5, 0][j],
                        Split::Rows => 0,
                    },
                    heads_per_task: [3, 1][j],
                    prefill_columns: [4, 8, 4, 16][i],
                });
            }
        }
        all
    }

    /// Every placement of the writers in plans whose prefill, and decode steps of many columns, exchange rows.
    pub fn of_rows() -> Vec<Choice> {
        let of_placement = |(i, writers): (usize, Placement)| {
            let by_rows = writers.groups == Split::Rows && writers.members == Split::Rows;
            Choice {
                groups: [2, 1][i % 2],
                members: [if by_rows { 2 } else { 3 }, 5][i % 2],
                helpers: [1, 0, 3, 2][i],
                writers,
                stream: StreamForm::Scattered,
                kv_splits: 1,
                replicate_below: 0,
                heads_per_task: [1, 3][i % 2],
                prefill_columns: 64,
            }
        };
        Placement::ALL
            .into_iter()
            .enumerate()
            .map(of_placement)
            .collect()
    }
}
