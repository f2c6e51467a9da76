//! Changes to quantizers by the rules of one section of a configuration, which must agree.

use std::fmt;

use super::{Constraints, Slots};
use crate::graph::ModuleId;
use std::ops::Range;

/// What a rule makes of a quantizer. One section may set each of the three once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change<'c> {
    Enabled(bool),
    Symmetric(bool),
    Constraints(&'c Constraints),
}

/// As in a configuration file.
impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Enabled(on) => write!(f, "quantized: {on}"),
            Change::Symmetric(symmetric) => write!(f, "is_symmetric: {symmetric}"),
            Change::Constraints(range) => write!(f, "encoding_constraints: {range:?}"),
        }
    }
}

/// The changes that a section has made to one quantizer, or to all of a group.
#[derive(Debug, Clone, Copy, Default)]
struct Changes<'c> {
    enabled: Option<bool>,
    symmetric: Option<bool>,
    constraints: Option<&'c Constraints>,
}

impl<'c> Changes<'c> {
    /// Notes a change, if it is the first of its setting; otherwise returns the one that was.
    fn note(&mut self, change: Change<'c>) -> Option<Change<'c>> {
        fn first<T: Copy>(setting: &mut Option<T>, value: T) -> Option<T> {
            let before = *setting;
            setting.get_or_insert(value);
            before
        }
        match change {
            Change::Enabled(on) => first(&mut self.enabled, on).map(Change::Enabled),
            Change::Symmetric(on) => first(&mut self.symmetric, on).map(Change::Symmetric),
            Change::Constraints(range) => {
                first(&mut self.constraints, range).map(Change::Constraints)
            }
        }
    }
}

/// Quantizers of one module that a rule reaches together.
#[derive(Debug, Clone, Copy)]
pub enum Group {
    Inputs(ModuleId),
    Outputs(ModuleId),
    FirstOutput(ModuleId),
}

impl Group {
    pub fn module(self) -> ModuleId {
        let (Group::Inputs(module) | Group::Outputs(module) | Group::FirstOutput(module)) = self;
        module
    }

    pub fn of(self, slots: &Slots) -> Range<usize> {
        match self {
            Group::Inputs(_) => slots.inputs(),
            Group::Outputs(_) => slots.outputs(),
            Group::FirstOutput(_) => {
                let Range { start, end } = slots.outputs();
                start..end.min(start + 1)
            }
        }
    }
}

/// What the rules of one section have set so far, each quantizer once.
#[derive(Debug)]
pub struct Section<'c> {
    /// Per quantizer.
    changes: Vec<Changes<'c>>,
    /// Per module and group: what all quantizers of the group have been set to.
    groups: Vec<[Changes<'c>; 3]>,
    /// Per node: all quantizers around it are asymmetric already, or symmetric.
    around: Vec<[bool; 2]>,
}

impl<'c> Section<'c> {
    pub fn new(quantizers: usize, modules: usize, nodes: usize) -> Self {
        Section {
            changes: vec![Changes::default(); quantizers],
            groups: vec![[Changes::default(); 3]; modules],
            around: vec![[false; 2]; nodes],
        }
    }

    /// Notes that all quantizers of a group get a change; returns whether they have it already.
    pub fn note_group(&mut self, group: Group, change: Change<'c>) -> bool {
        let which = match group {
            Group::Inputs(_) => 0,
            Group::Outputs(_) => 1,
            Group::FirstOutput(_) => 2,
        };
        self.groups[group.module()][which].note(change) == Some(change)
    }

    /// Notes a change of a quantizer; returns the one of the same setting that it has already.
    pub fn note(&mut self, quantizer: usize, change: Change<'c>) -> Option<Change<'c>> {
        self.changes[quantizer].note(change)
    }

    /// Notes that all quantizers around a node get this symmetry; returns whether they have it already.
    pub fn note_around(&mut self, node: usize, symmetric: bool) -> bool {
        std::mem::replace(&mut self.around[node][usize::from(symmetric)], true)
    }
}
