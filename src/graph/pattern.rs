//! Chains of operators in a graph.
//!
//! Patterns are matched on the *flow* view: without nodes that only hand their input on, and with "the output
//! of this node goes to exactly one place" as the condition for a chain to continue.

use std::collections::{HashMap, HashSet};

use super::{Graph, NodeId, Source, TensorId};

/// Where an input of a node comes from, looking through nodes that only hand their input on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Node(NodeId, usize),
    Parameter,
    /// A model input, a constant tensor or a number.
    Root(Option<TensorId>),
}

/// The graph as patterns and placement see it. Made once, in time linear in the graph.
#[derive(Debug)]
pub struct Flow<'g> {
    pub graph: &'g Graph,
    /// Per node and input: the origin.
    pub origins: Vec<Vec<Origin>>,
    /// Per node: (consumer, input index) of every edge that leaves it, in order of execution.
    pub consumers: Vec<Vec<(NodeId, usize)>>,
    /// Nodes that are operations of their own, in order of execution.
    pub ops: Vec<NodeId>,
    /// Operator type to its nodes, in order of execution. A pass over all nodes for each pattern would read
    /// the whole graph again and again: that is what it costs, once the graph is larger than a cache.
    of_type: HashMap<&'g str, Vec<NodeId>>,
}

impl<'g> Flow<'g> {
    pub fn new(graph: &'g Graph) -> Self {
        let passthrough: Vec<bool> = (0..graph.nodes.len())
            .map(|node| graph.is_passthrough(node))
            .collect();
        let mut origin_of: Vec<Origin> = Vec::with_capacity(graph.tensors.len());
        for (id, tensor) in graph.tensors.iter().enumerate() {
            let origin = match &tensor.source {
                // Tensors stand in the order in which they were made, so the input of a passthrough node
                // has its origin already.
                Source::Node(node, _) if passthrough[*node] => graph.nodes[*node]
                    .inputs
                    .iter()
                    .find_map(|input| input.tensor)
                    .map_or(Origin::Root(None), |t| origin_of[t]),
                Source::Node(node, output) => Origin::Node(*node, *output),
                Source::Parameter(_) => Origin::Parameter,
                Source::Input(_) | Source::Constant => Origin::Root(Some(id)),
            };
            origin_of.push(origin);
        }
        let mut origins = vec![Vec::new(); graph.nodes.len()];
        let mut consumers = vec![Vec::new(); graph.nodes.len()];
        let mut ops = Vec::new();
        let mut of_type: HashMap<&str, Vec<NodeId>> = HashMap::new();
        for (id, node) in graph.nodes.iter().enumerate() {
            if passthrough[id] {
                continue;
            }
            ops.push(id);
            of_type.entry(&node.op_type).or_default().push(id);
            for (index, input) in node.inputs.iter().enumerate() {
                let origin = input.tensor.map_or(Origin::Root(None), |t| origin_of[t]);
                if let Origin::Node(producer, _) = origin {
                    consumers[producer].push((id, index));
                }
                origins[id].push(origin);
            }
        }
        Flow {
            graph,
            origins,
            consumers,
            ops,
            of_type,
        }
    }

    /// Nodes of the operator types that `wanted` picks, in order of execution.
    pub fn ops_of_types(&self, wanted: impl Fn(&str) -> bool) -> Vec<NodeId> {
        let chosen = self.of_type.iter().filter(|(op_type, _)| wanted(op_type));
        let mut nodes: Vec<NodeId> = chosen.flat_map(|(_, nodes)| nodes).copied().collect();
        nodes.sort_unstable();
        nodes
    }

    pub fn op_type(&self, id: NodeId) -> &str {
        &self.graph.nodes[id].op_type
    }

    /// The class key of the module of a node.
    pub fn class(&self, id: NodeId) -> Option<&str> {
        self.graph.nodes[id]
            .module
            .map(|m| self.graph.modules[m].class.as_str())
    }

    /// All chains of the given operator types, longest pattern first, in order of execution, no node in two
    /// chains. Nodes in `skip` are looked through; chains whose first node `reject`s are left out.
    pub fn chains(
        &self,
        patterns: &[Vec<String>],
        skip: &HashSet<NodeId>,
        reject: impl Fn(NodeId) -> bool,
    ) -> Vec<Vec<NodeId>> {
        let mut sorted: Vec<&Vec<String>> = patterns.iter().filter(|p| !p.is_empty()).collect();
        sorted.sort_by_key(|pattern| std::cmp::Reverse(pattern.len()));
        let mut taken = HashSet::new();
        let mut found = Vec::new();
        for pattern in sorted {
            for &op in self.of_type.get(pattern[0].as_str()).into_iter().flatten() {
                if skip.contains(&op) || reject(op) {
                    continue;
                }
                let Some(chain) = self.follow(op, pattern, skip) else {
                    continue;
                };
                if chain.iter().all(|node| !taken.contains(node)) {
                    taken.extend(chain.iter().copied());
                    found.push(chain);
                }
            }
        }
        found
    }

    /// The one node that uses the output of `node` as its first argument, if nothing else sees that tensor: no
    /// second use, no output of the model. Stricter than [`Flow::origins`] in what it looks through: only
    /// nodes that hand on the very same values, so that arithmetic may move from one end to the other.
    pub fn sole_consumer(&self, node: NodeId) -> Option<NodeId> {
        let mut node = node;
        loop {
            let [output] = self.graph.nodes[node].outputs[..] else {
                return None;
            };
            let tensor = &self.graph.tensors[output];
            let ([next], None) = (&tensor.consumers[..], tensor.output) else {
                return None;
            };
            if self.graph.nodes[*next].inputs.first()?.tensor != Some(output) {
                return None;
            }
            if !self.graph.is_passthrough(*next) {
                return Some(*next);
            }
            let [handed_on] = self.graph.nodes[*next].outputs[..] else {
                return None;
            };
            let same = &self.graph.tensors[handed_on];
            let transposed = self.graph.nodes[*next].function.as_deref() == Some("t");
            if transposed || (&same.shape, &same.dtype) != (&tensor.shape, &tensor.dtype) {
                return None;
            }
            node = *next;
        }
    }

    /// The chain that starts at `start`, where every node but the last has exactly one consumer.
    fn follow(
        &self,
        start: NodeId,
        pattern: &[String],
        skip: &HashSet<NodeId>,
    ) -> Option<Vec<NodeId>> {
        let mut chain = vec![start];
        let mut node = start;
        while chain.len() < pattern.len() {
            let [(next, _)] = self.consumers[node][..] else {
                return None;
            };
            node = next;
            if skip.contains(&node) {
                continue;
            }
            if self.op_type(node) != pattern[chain.len()] {
                return None;
            }
            chain.push(node);
        }
        Some(chain)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn pattern(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn longer_first_no_overlap_no_branch() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c1", 1), &[x]); // 0
        let b = net.add(norm("b1"), &[a]); // 1
        let c = net.add(module("r1", "nn.ReLU"), &[b]); // 2
        let d = net.add(conv("c2", 1), &[c]); // 3, branches
        let e = net.add(module("r2", "nn.ReLU"), &[d]); // 4
        let f = net.function("add", &[d, e]); // 5
        let g = net.add(module("r3", "nn.ReLU"), &[f]); // 6
        let graph = net.finish(g);
        let flow = Flow::new(&graph);
        let patterns = [
            pattern(&["Conv", "BatchNormalization"]),
            pattern(&["Conv", "BatchNormalization", "Relu"]),
        ];
        assert_eq!(
            flow.chains(&patterns, &HashSet::new(), |_| false),
            vec![vec![0, 1, 2]]
        );
        let patterns = [pattern(&["Conv", "Relu"]), pattern(&["Add", "Relu"])];
        assert_eq!(
            flow.chains(&patterns, &HashSet::new(), |_| false),
            vec![vec![5, 6]]
        );
        let skip = HashSet::from([1]);
        assert_eq!(
            flow.chains(&patterns, &skip, |_| false),
            vec![vec![0, 2], vec![5, 6]]
        );
        assert_eq!(
            flow.chains(&patterns, &skip, |op| op == 0),
            vec![vec![5, 6]]
        );
    }

    #[test]
    fn identity_is_looked_through() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.add(module("id", "nn.Identity"), &[a]);
        let c = net.function("detach", &[b]);
        let d = net.add(module("r", "nn.ReLU"), &[c]);
        let graph = net.finish(d);
        let flow = Flow::new(&graph);
        assert_eq!(
            flow.chains(&[pattern(&["Conv", "Relu"])], &HashSet::new(), |_| false),
            vec![vec![0, 3]]
        );
        assert_eq!(flow.origins[3], vec![Origin::Node(0, 0)]);
    }
}
