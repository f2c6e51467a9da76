//! A run of a model as plain data that can be run again: which callables, on which values, in which order.
//!
//! A [`Graph`](super::Graph) says what a model means (modules and torch functions, for quantizer placement); a
//! [`Program`] says what it did, operator by operator, and how long each value lives. It holds no tensors and
//! no callables of its own: whoever runs it resolves names.
//!
//! A [`Value`] is one tensor object: one way (offset, sizes, strides) to look at one storage. An in-place
//! operator writes to a storage and so changes every value on it without making a new one; running the steps in
//! order on real tensors gives views and in-place writes their meaning.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;

use super::error::GraphError;

/// Index of a step in [`Program::steps`], which stand in the order of execution.
pub type StepId = usize;
/// Index of a value in [`Program::values`].
pub type ValueId = usize;
/// Index of a piece of memory that values share.
pub type StorageId = usize;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// An input of the run, with its position in the flattened inputs.
    Input(usize),
    /// A parameter or buffer of the model, with its dotted name: read anew in every run.
    State(String),
    /// A tensor that existed before the run and is neither: with its number in the runner's table.
    Constant(usize),
    /// Made by a step.
    Step(StepId),
}

/// One tensor object of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Value {
    pub origin: Origin,
    pub storage: StorageId,
    /// The last step that takes it; `None` if no step does.
    pub last_use: Option<StepId>,
    /// It is part of the run's result, and lives to the end.
    pub is_output: bool,
}

/// What a step calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Callable {
    /// The module at this dotted path.
    Module(String),
    /// A torch operator, by its overload's name: `aten::add.Tensor`.
    Operator(String),
    /// Nothing: the contents of the inputs left torch here (`tolist`, `numpy`) and must be what they were.
    Guard(String),
}

/// One call.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub callable: Callable,
    /// Path of the innermost module whose forward was running.
    pub scope: String,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
    /// The storages that the call wrote to.
    pub writes: Vec<StorageId>,
    /// The call drew from the random number generator.
    pub is_random: bool,
}

/// An output of a step, as the recorder saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A value that was there already: an in-place operator hands on what it wrote to.
    Known(ValueId),
    /// A new way to look at a storage.
    View(StorageId),
    /// New memory.
    Fresh,
}

/// What ran, as plain data. Made by a [`ProgramBuilder`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Program {
    pub values: Vec<Value>,
    pub steps: Vec<Step>,
    pub outputs: Vec<ValueId>,
    /// For each step, the values that nothing needs after it.
    expiring: Vec<Vec<ValueId>>,
    /// Steps that call a module, by path, in order.
    calls: HashMap<String, Vec<StepId>>,
    /// For each value, the steps that take it, in order.
    consumers: Vec<Vec<StepId>>,
}

impl Program {
    /// The values that nothing needs once step `step` has run.
    pub fn expiring(&self, step: StepId) -> &[ValueId] {
        &self.expiring[step]
    }

    /// The steps that call the module at `path`.
    pub fn calls(&self, path: &str) -> &[StepId] {
        self.calls.get(path).map_or(&[], Vec::as_slice)
    }

    /// Whether some step draws random numbers.
    pub fn is_random(&self) -> bool {
        self.steps.iter().any(|step| step.is_random)
    }

    /// What the run did not make and yet writes to: inputs, parameters, buffers, constants.
    pub fn written(&self) -> Vec<&Origin> {
        let written = self.mark(self.steps.iter().flat_map(|s| s.writes.iter().copied()));
        self.values
            .iter()
            .filter(|value| written[value.storage] && !matches!(value.origin, Origin::Step(_)))
            .map(|value| &value.origin)
            .collect()
    }

    /// The values on memory that outlives the run: parameters, buffers, constants and views of them.
    pub fn outside(&self) -> Vec<ValueId> {
        let is_outside = |v: &&Value| matches!(v.origin, Origin::State(_) | Origin::Constant(_));
        let marked = self.mark(self.values.iter().filter(is_outside).map(|v| v.storage));
        let ids = 0..self.values.len();
        ids.filter(|&id| marked[self.values[id].storage]).collect()
    }

    /// The values on memory that some step writes to after it was made.
    pub fn mutable(&self) -> Vec<ValueId> {
        let written = self.mark(self.steps.iter().flat_map(|s| s.writes.iter().copied()));
        let ids = 0..self.values.len();
        ids.filter(|&id| written[self.values[id].storage]).collect()
    }

    /// A table of storages with `true` at the given ones.
    fn mark(&self, storages: impl Iterator<Item = StorageId>) -> Vec<bool> {
        let count = self.values.iter().map(|v| v.storage + 1).max();
        let mut marked = vec![false; count.unwrap_or(0)];
        storages.for_each(|storage| marked[storage] = true);
        marked
    }

    /// The one step that consumes what the first call of the module at `path` gives; `None` if there are several,
    /// if the result is an output of the run, or if the module gives several tensors. Steps that hand on their
    /// input (a dropout in evaluation) are looked through.
    pub fn single_consumer(&self, path: &str) -> Option<StepId> {
        let mut producer = *self.calls(path).first()?;
        let &[value] = self.steps[producer].outputs.as_slice() else {
            return None;
        };
        loop {
            let mut later = self.consumers[value].iter().filter(|&&c| c > producer);
            let consumer = *later.next()?;
            let step = &self.steps[consumer];
            let is_same = step.outputs == [value];
            if is_same && step.writes.is_empty() {
                producer = consumer;
                continue;
            }
            // An in-place consumer leaves nothing of what it took for those behind it.
            let is_overwritten = is_same && step.writes.contains(&self.values[value].storage);
            let is_only = later.next().is_none() && !self.values[value].is_output;
            return (is_overwritten || is_only).then_some(consumer);
        }
    }
}

/// Takes the events of one run in their order and makes a [`Program`] of them; every event costs constant time.
#[derive(Debug, Default)]
pub struct ProgramBuilder {
    program: Program,
    storages: usize,
}

impl ProgramBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a value that no step made; `storage` if another value looks at the same memory.
    pub fn value(&mut self, origin: Origin, storage: Option<StorageId>) -> (ValueId, StorageId) {
        let storage = storage.unwrap_or_else(|| self.new_storage());
        let id = self.program.values.len();
        self.program.values.push(Value {
            origin,
            storage,
            last_use: None,
            is_output: false,
        });
        self.program.consumers.push(Vec::new());
        (id, storage)
    }

    /// Something was called. Returns the ids of its outputs with their storages.
    ///
    /// # Errors
    /// [`GraphError::UnknownTensor`] for a value that was never declared.
    pub fn step(
        &mut self,
        callable: Callable,
        scope: String,
        inputs: Vec<ValueId>,
        outputs: &[Output],
        writes: Vec<StorageId>,
        is_random: bool,
    ) -> Result<Vec<(ValueId, StorageId)>, GraphError> {
        let id = self.program.steps.len();
        for &input in &inputs {
            self.check(input)?;
            self.program.values[input].last_use = Some(id);
            let consumers = &mut self.program.consumers[input];
            if consumers.last() != Some(&id) {
                consumers.push(id);
            }
        }
        let mut made = Vec::with_capacity(outputs.len());
        for &output in outputs {
            made.push(match output {
                Output::Known(value) => {
                    self.check(value)?;
                    (value, self.program.values[value].storage)
                }
                Output::View(storage) => self.value(Origin::Step(id), Some(storage)),
                Output::Fresh => self.value(Origin::Step(id), None),
            });
        }
        if let Callable::Module(path) = &callable {
            self.program.calls.entry(path.clone()).or_default().push(id);
        }
        self.program.steps.push(Step {
            callable,
            scope,
            inputs,
            outputs: made.iter().map(|&(value, _)| value).collect(),
            writes,
            is_random,
        });
        Ok(made)
    }

    /// The finished program, `outputs` being its result.
    ///
    /// # Errors
    /// [`GraphError::UnknownTensor`] for a value that was never declared.
    pub fn finish(mut self, outputs: Vec<ValueId>) -> Result<Program, GraphError> {
        for &output in &outputs {
            self.check(output)?;
            self.program.values[output].is_output = true;
        }
        let program = &mut self.program;
        program.outputs = outputs;
        program.expiring = vec![Vec::new(); program.steps.len()];
        for (id, step) in program.steps.iter().enumerate() {
            // What is made and never taken goes at once.
            for &value in &step.outputs {
                let it = &program.values[value];
                if !it.is_output && it.last_use.is_none_or(|last| last < id) {
                    program.expiring[id].push(value);
                }
            }
        }
        for (id, value) in program.values.iter().enumerate() {
            if let (Some(last), false) = (value.last_use, value.is_output) {
                program.expiring[last].push(id);
            }
        }
        Ok(self.program)
    }

    fn new_storage(&mut self) -> StorageId {
        self.storages += 1;
        self.storages - 1
    }

    fn check(&self, id: ValueId) -> Result<(), GraphError> {
        let known = self.program.values.len();
        if id < known {
            Ok(())
        } else {
            Err(GraphError::UnknownTensor { id, known })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run(ProgramBuilder);

    impl Run {
        fn module(&mut self, path: &str, input: ValueId) -> ValueId {
            self.call(
                Callable::Module(path.into()),
                &[input],
                Output::Fresh,
                vec![],
            )
        }
        fn operator(&mut self, name: &str, inputs: &[ValueId]) -> ValueId {
            self.call(
                Callable::Operator(name.into()),
                inputs,
                Output::Fresh,
                vec![],
            )
        }
        fn call(
            &mut self,
            callable: Callable,
            inputs: &[ValueId],
            output: Output,
            writes: Vec<StorageId>,
        ) -> ValueId {
            let made = self.0.step(
                callable,
                String::new(),
                inputs.to_vec(),
                &[output],
                writes,
                false,
            );
            made.unwrap()[0].0
        }
    }

    fn run() -> (Run, ValueId) {
        let mut builder = ProgramBuilder::new();
        let (input, _) = builder.value(Origin::Input(0), None);
        (Run(builder), input)
    }

    #[test]
    fn values_live_to_their_last_use_and_results_to_the_end() {
        let (mut run, x) = run();
        let a = run.module("a", x);
        let b = run.module("b", a);
        let unused = run.operator("aten::neg", &[b]);
        let sum = run.operator("aten::add.Tensor", &[a, b]);
        let program = run.0.finish(vec![sum]).unwrap();
        assert_eq!(program.expiring(0), [x]);
        assert!(program.expiring(1).is_empty());
        assert_eq!(program.expiring(2), [unused]);
        assert_eq!(program.expiring(3), [a, b]);
        assert_eq!(program.calls("b"), [1]);
        assert!(program.calls("c").is_empty());
    }

    #[test]
    fn single_consumer_needs_to_be_the_only_one() {
        let (mut run, x) = run();
        let a = run.module("a", x);
        run.operator("aten::relu", &[a]);
        let b = run.module("b", x);
        let c = run.operator("aten::relu", &[b]);
        run.operator("aten::add.Tensor", &[b, c]);
        let d = run.module("d", x);
        run.operator("aten::relu", &[d]);
        let program = run.0.finish(vec![d]).unwrap();
        assert_eq!(program.single_consumer("a"), Some(1));
        assert_eq!(
            program.single_consumer("b"),
            None,
            "taken before the activation as well"
        );
        assert_eq!(
            program.single_consumer("d"),
            None,
            "a result of the run as well"
        );
    }

    #[test]
    fn single_consumer_knows_in_place_and_handing_on() {
        let (mut run, x) = run();
        let a = run.module("a", x);
        run.call(
            Callable::Module("dropout".into()),
            &[a],
            Output::Known(a),
            vec![],
        );
        let storage = run.0.program.values[a].storage;
        run.call(
            Callable::Operator("aten::relu_".into()),
            &[a],
            Output::Known(a),
            vec![storage],
        );
        run.operator("aten::neg", &[a]);
        let out = run.operator("aten::exp", &[a]);
        let program = run.0.finish(vec![out]).unwrap();
        assert_eq!(program.single_consumer("a"), Some(2));
    }

    #[test]
    fn what_is_written_to_from_outside_is_known() {
        let (mut run, x) = run();
        let (_, buffer) = run.0.value(Origin::State("count".into()), None);
        let made = run.operator("aten::neg", &[x]);
        let own = run.0.program.values[made].storage;
        run.call(
            Callable::Operator("aten::add_".into()),
            &[made],
            Output::Known(made),
            vec![own],
        );
        let before = run.0.program.clone();
        assert!(before.written().is_empty());
        assert_eq!(before.mutable(), [made]);
        run.call(
            Callable::Operator("aten::add_".into()),
            &[1],
            Output::Known(1),
            vec![buffer],
        );
        let program = run.0.finish(vec![]).unwrap();
        assert_eq!(program.written(), [&Origin::State("count".into())]);
        assert_eq!(program.outside(), [1]);
    }

    #[test]
    fn unknown_values_are_refused() {
        let mut builder = ProgramBuilder::new();
        let result = builder.step(
            Callable::Guard("tolist".into()),
            String::new(),
            vec![3],
            &[],
            vec![],
            false,
        );
        assert!(matches!(
            result,
            Err(GraphError::UnknownTensor { id: 3, known: 0 })
        ));
        assert!(ProgramBuilder::new().finish(vec![0]).is_err());
    }
}
