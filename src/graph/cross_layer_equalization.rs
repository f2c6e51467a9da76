//! Which layers of a graph can share the scale of the channels between them.

use std::collections::HashSet;

use super::pattern::Flow;
use super::{Graph, ModuleId, NodeId};

const LAYERS: &[&str] = &[
    "nn.Conv1d",
    "nn.Conv2d",
    "nn.ConvTranspose1d",
    "nn.ConvTranspose2d",
];
/// Activations with `f(s x) = s f(x)` for `s > 0`. ReLU6 is none.
const ACTIVATIONS: &[&str] = &["nn.ReLU", "nn.PReLU"];
const NORMS: &[&str] = &["nn.LayerNorm", "nn.RMSNorm", "custom.RmsNorm"];

/// A layer of a group, and whether an activation stands between it and the next one (behind the last: after
/// it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub layer: ModuleId,
    pub activation: bool,
}

/// Maximal chains of convolutions with nothing but positively homogeneous activations between them, in order
/// of execution.
///
/// Each layer ran once, and nothing else sees the tensors between two of them ([`Flow::sole_consumer`]).
/// Modules in `fixed` keep their parameters and take no part. Those in `folded` are looked through: batch
/// normalizations that have been folded into a layer since the graph was recorded.
pub fn layer_groups(
    graph: &Graph,
    fixed: &HashSet<ModuleId>,
    folded: &HashSet<ModuleId>,
) -> Vec<Vec<Member>> {
    let flow = Flow::new(graph);
    let is_folded = |node: NodeId| {
        graph.nodes[node]
            .module
            .is_some_and(|m| folded.contains(&m))
    };
    let consumer = |node: NodeId| {
        let mut next = flow.sole_consumer(node);
        while next.is_some_and(is_folded) {
            next = next.and_then(|node| flow.sole_consumer(node));
        }
        next
    };
    let layer = |node: NodeId| {
        graph.nodes[node].module.filter(|m| {
            let module = &graph.modules[*m];
            LAYERS.contains(&module.class.as_str()) && module.calls.len() == 1 && !fixed.contains(m)
        })
    };
    let is_activation = |node: NodeId| match graph.nodes[node].module {
        Some(m) => ACTIVATIONS.contains(&graph.modules[m].class.as_str()),
        None => graph.nodes[node].function.is_some_and(|f| f == "relu"),
    };
    let mut taken = HashSet::new();
    let mut groups = Vec::new();
    for &start in &flow.ops {
        // A layer in the middle of a chain was reached from the layers before it.
        if layer(start).is_none() || !taken.insert(start) {
            continue;
        }
        let mut group = Vec::new();
        let mut next = Some(start);
        while let Some((node, id)) = next.and_then(|node| Some((node, layer(node)?))) {
            taken.insert(node);
            next = consumer(node);
            let activation = next.is_some_and(is_activation);
            while next.is_some_and(is_activation) {
                next = next.and_then(consumer);
            }
            group.push(Member {
                layer: id,
                activation,
            });
        }
        groups.push(group);
    }
    groups
}

/// The channels of a layer, as far as they decide what it can be scaled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub in_channels: i64,
    pub out_channels: i64,
    pub groups: i64,
}

/// Cuts a group of consecutive layers into sets that are scaled together, as positions in the group: two
/// convolutions, or two with a depthwise one between them. Neighbouring sets share a layer. A depthwise
/// convolution begins a set where nothing before it can be scaled; other grouped convolutions are in none.
pub fn cut_into_sets(group: &[Shape]) -> Vec<Vec<usize>> {
    let mut sets = Vec::new();
    let mut current: Vec<usize> = Vec::new();
    for (position, shape) in group.iter().enumerate() {
        if shape.groups == 1 {
            if !current.is_empty() {
                current.push(position);
                sets.push(std::mem::take(&mut current));
            }
            current.push(position);
        } else if shape.groups == shape.in_channels && shape.groups == shape.out_channels {
            if current.len() != 1 || group[current[0]].groups != 1 {
                current.clear();
            }
            current.push(position);
        } else {
            current.clear();
        }
    }
    sets
}

/// Normalizations with a weight per channel whose every consumer is a linear layer, with these layers.
pub fn norm_linears(graph: &Graph, fixed: &HashSet<ModuleId>) -> Vec<(ModuleId, Vec<ModuleId>)> {
    let free = |node: NodeId, classes: &[&str]| {
        graph.nodes[node].module.filter(|m| {
            let module = &graph.modules[*m];
            classes.contains(&module.class.as_str())
                && module.calls.len() == 1
                && !fixed.contains(m)
        })
    };
    let mut found = Vec::new();
    for (node, entry) in graph.nodes.iter().enumerate() {
        let Some(norm) = free(node, NORMS) else {
            continue;
        };
        let weight = graph.modules[norm]
            .params
            .iter()
            .find(|p| p.name == "weight");
        let [tensor] = &graph.tensors[entry.outputs.clone()] else {
            continue;
        };
        if weight.is_none_or(|w| w.shape.len() != 1) || tensor.output.is_some() {
            continue;
        }
        let linears: Option<Vec<ModuleId>> = tensor
            .consumers
            .iter()
            .map(|&consumer| {
                let inputs = graph.inputs(consumer);
                free(consumer, &["nn.Linear"]).filter(|_| inputs.len() == 1)
            })
            .collect();
        if let Some(linears) = linears.filter(|l| !l.is_empty()) {
            found.push((norm, linears));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{Module, Parameter};
    use super::*;

    fn paths(graph: &Graph, groups: &[Vec<Member>]) -> Vec<Vec<(String, bool)>> {
        let show = |m: &Member| (graph.modules[m.layer].path.clone(), m.activation);
        groups
            .iter()
            .map(|g| g.iter().map(show).collect())
            .collect()
    }

    #[test]
    fn chains_end_where_another_sees_the_tensor() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("a", 1), &[x]);
        let r = net.add(module("r", "nn.ReLU"), &[a]);
        let b = net.add(conv("b", 1), &[r]);
        let f = net.function("relu_", &[b]);
        let c = net.add(conv("c", 1), &[f]);
        let d = net.add(conv("d", 1), &[c]);
        let s = net.function("add", &[c, d]);
        let e = net.add(conv("e", 1), &[s]);
        let six = net.add(module("six", "nn.ReLU6"), &[e]);
        let g = net.add(conv("g", 1), &[six]);
        let graph = net.finish(g);
        let named = |p: &[(&str, bool)]| -> Vec<(String, bool)> {
            p.iter().map(|&(n, a)| (n.to_owned(), a)).collect()
        };
        let groups = layer_groups(&graph, &HashSet::new(), &HashSet::new());
        assert_eq!(
            paths(&graph, &groups),
            [
                named(&[("a", true), ("b", true), ("c", false)]),
                named(&[("d", false)]),
                named(&[("e", false)]),
                named(&[("g", false)]),
            ]
        );
        let fixed = HashSet::from([graph.module("b").unwrap()]);
        let groups = layer_groups(&graph, &fixed, &HashSet::new());
        assert_eq!(
            paths(&graph, &groups)[..2],
            [named(&[("a", true)]), named(&[("c", false)])]
        );
    }

    #[test]
    fn folded_norms_are_looked_through() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("a", 1), &[x]);
        let n = net.add(norm("n"), &[a]);
        let r = net.add(module("r", "nn.ReLU"), &[n]);
        let m = net.add(norm("m"), &[r]);
        let b = net.add(conv("b", 1), &[m]);
        let graph = net.finish(b);
        let id = |path: &str| graph.module(path).unwrap();
        let groups = |folded: &[&str]| {
            let folded = folded.iter().map(|p| id(p)).collect();
            paths(&graph, &layer_groups(&graph, &HashSet::new(), &folded))
        };
        let a = ("a".to_owned(), true);
        let b = ("b".to_owned(), false);
        assert_eq!(groups(&["n", "m"]), [vec![a.clone(), b.clone()]]);
        assert_eq!(groups(&["n"]), [vec![a], vec![b.clone()]]);
        assert_eq!(groups(&[]), [vec![("a".to_owned(), false)], vec![b]]);
    }

    #[test]
    fn sets_of_a_group() {
        let of = |kinds: &str| -> Vec<Vec<usize>> {
            let shape = |kind| {
                let groups = match kind {
                    'c' => 1,
                    'd' => 8,
                    _ => 2,
                };
                Shape {
                    in_channels: 8,
                    out_channels: 8,
                    groups,
                }
            };
            cut_into_sets(&kinds.chars().map(shape).collect::<Vec<_>>())
        };
        assert_eq!(of("cc"), [vec![0, 1]]);
        assert_eq!(of("cdc"), [vec![0, 1, 2]]);
        assert_eq!(of("cdcdc"), [vec![0, 1, 2], vec![2, 3, 4]]);
        assert_eq!(of("ccdc"), [vec![0, 1], vec![1, 2, 3]]);
        assert_eq!(of("dcc"), [vec![0, 1], vec![1, 2]]);
        assert_eq!(of("cddc"), [vec![2, 3]]);
        assert_eq!(of("gcc"), [vec![1, 2]]);
        assert!(of("cd").is_empty() && of("cgc").is_empty() && of("").is_empty());
    }

    #[test]
    fn norms_with_linears_only() {
        let norm = |path: &str| Module {
            params: vec![Parameter {
                name: "weight".into(),
                shape: vec![8],
            }],
            ..module(path, "nn.LayerNorm")
        };
        let mut net = Net::new();
        let x = net.input();
        let n = net.add(norm("n"), &[x]);
        let q = net.add(module("q", "nn.Linear"), &[n]);
        let k = net.add(module("k", "nn.Linear"), &[n]);
        let s = net.function("add", &[q, k]);
        let m = net.add(norm("m"), &[s]);
        let l = net.add(module("l", "nn.Linear"), &[m]);
        let out = net.function("add", &[l, m]);
        let graph = net.finish(out);
        let id = |p: &str| graph.module(p).unwrap();
        assert_eq!(
            norm_linears(&graph, &HashSet::new()),
            [(id("n"), vec![id("q"), id("k")])]
        );
        assert!(norm_linears(&graph, &HashSet::from([id("k")])).is_empty());
    }
}
