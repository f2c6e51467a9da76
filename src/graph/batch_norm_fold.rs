//! Which batch normalizations of a graph can be folded into which layers.

use std::collections::HashSet;

use super::pattern::{Flow, Origin};
use super::symbol::Symbol;
use super::{Graph, ModuleId, NodeId};

const BATCH_NORMS: &[&str] = &[
    "nn.BatchNorm1d",
    "nn.BatchNorm2d",
    "nn.BatchNorm3d",
    "nn.SyncBatchNorm",
    "torchvision.FrozenBatchNorm2d",
];

/// (class, rank of its input for which the channels are in dimension 1)
const LAYERS: &[(&str, usize)] = &[
    ("nn.Conv1d", 3),
    ("nn.Conv2d", 4),
    ("nn.Conv3d", 5),
    ("nn.ConvTranspose1d", 3),
    ("nn.ConvTranspose2d", 4),
    ("nn.ConvTranspose3d", 5),
    ("nn.Linear", 2),
];

/// What may become of the batch normalizations of a graph. Every module is in one place at most, but for
/// layers with a normalization on either side.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Folds {
    /// (layer, normalization behind it), in order of execution.
    pub backward: Vec<(ModuleId, ModuleId)>,
    /// (normalization, layer behind it), in order of execution.
    pub forward: Vec<(ModuleId, ModuleId)>,
    /// Normalizations that ran and stay.
    pub standalone: Vec<ModuleId>,
}

/// Finds the folds that keep the function of the model.
///
/// A normalization is folded if it and the layer ran once, nothing else sees the tensor between them
/// ([`Flow::sole_consumer`]), and the layer's channels are the normalization's. Folding backward is
/// preferred. Modules in `fixed` keep their parameters; layers in `backward_only` take no fold
/// forward (padding, for instance, puts zeros where the normalization would have put its shift).
pub fn find(graph: &Graph, fixed: &HashSet<ModuleId>, backward_only: &HashSet<ModuleId>) -> Folds {
    let flow = Flow::new(graph);
    // The module of a node, if it runs just there and may be changed.
    let free = |node: NodeId| {
        graph.nodes[node]
            .module
            .filter(|m| !fixed.contains(m) && graph.modules[*m].calls.len() == 1)
    };
    let is_norm = |m: ModuleId| BATCH_NORMS.contains(&graph.modules[m].class.as_str());
    let rank = |m: ModuleId| {
        let class = graph.modules[m].class.as_str();
        LAYERS.iter().find(|l| l.0 == class).map(|l| l.1)
    };
    let has_rank = |node: NodeId, rank: usize| {
        let mut outputs = graph.nodes[node].outputs.clone();
        outputs
            .next()
            .is_some_and(|t| graph.tensors[t].shape.len() == rank)
    };

    let mut folds = Folds::default();
    let mut folded = HashSet::new();
    for &node in &flow.ops {
        let Some(layer) = free(node) else { continue };
        if !rank(layer).is_some_and(|rank| has_rank(node, rank)) {
            continue;
        }
        if let Some(norm) = flow
            .sole_consumer(node)
            .and_then(free)
            .filter(|&m| is_norm(m))
        {
            folded.insert(norm);
            folds.backward.push((layer, norm));
        }
    }
    for &node in &flow.ops {
        let Some(norm) = free(node).filter(|m| is_norm(*m) && !folded.contains(m)) else {
            continue;
        };
        let layer = flow.sole_consumer(node).and_then(free);
        let Some(layer) = layer.filter(|m| !backward_only.contains(m)) else {
            continue;
        };
        if rank(layer).is_some_and(|rank| has_rank(node, rank)) {
            folded.insert(norm);
            folds.forward.push((norm, layer));
        }
    }
    folds.standalone = (0..graph.modules.len())
        .filter(|&m| is_norm(m) && !graph.modules[m].calls.is_empty())
        .filter(|m| !fixed.contains(m) && !folded.contains(m))
        .collect();
    folds.standalone.sort_by_key(|&m| graph.modules[m].calls[0]);
    folds
}

/// What a tensor goes through next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follower {
    Relu,
    Relu6,
    Other,
}

/// A layer with the batch normalizations next to it. The activation of `input` stands between the
/// normalization and the layer, that of `output` behind the normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbours {
    pub layer: ModuleId,
    pub input: Option<(ModuleId, Follower)>,
    pub output: Option<(ModuleId, Follower)>,
}

/// Layers that have a batch normalization next to them, in order of execution.
pub fn neighbours(graph: &Graph) -> Vec<Neighbours> {
    let flow = Flow::new(graph);
    let module = |node: NodeId| graph.nodes[node].module;
    let class = |node: NodeId| module(node).map(|m| graph.modules[m].class.as_str());
    let norm = |node: NodeId| {
        module(node).filter(|_| class(node).is_some_and(|c| BATCH_NORMS.contains(&c)))
    };
    let follower =
        |node: NodeId| match (class(node), graph.nodes[node].function.map(Symbol::as_str)) {
            (Some("nn.ReLU"), _) | (_, Some("relu")) => Follower::Relu,
            (Some("nn.ReLU6"), _) => Follower::Relu6,
            _ => Follower::Other,
        };
    let origin = |node: NodeId| match flow.arguments(node).first()?.origin {
        Origin::Node(producer, 0) => Some(producer as NodeId),
        _ => None,
    };
    let mut found = Vec::new();
    for &node in &flow.ops {
        let is_layer = class(node).is_some_and(|c| LAYERS.iter().any(|l| l.0 == c));
        let Some(layer) = module(node).filter(|m| is_layer && graph.modules[*m].calls.len() == 1)
        else {
            continue;
        };
        let input = origin(node).and_then(|producer| match norm(producer) {
            Some(m) => Some((m, Follower::Other)),
            None if follower(producer) != Follower::Other => {
                let m = origin(producer).and_then(norm)?;
                Some((m, follower(producer)))
            }
            None => None,
        });
        let output = flow.sole_consumer(node).and_then(|next| {
            let behind = flow.sole_consumer(next).map_or(Follower::Other, follower);
            Some((norm(next)?, behind))
        });
        if input.is_some() || output.is_some() {
            found.push(Neighbours {
                layer,
                input,
                output,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn ids(graph: &Graph, paths: &[&str]) -> HashSet<ModuleId> {
        paths.iter().map(|p| graph.module(p).unwrap()).collect()
    }

    fn named(graph: &Graph, pairs: &[(ModuleId, ModuleId)]) -> Vec<(String, String)> {
        let path = |m: ModuleId| graph.modules[m].path.clone();
        pairs.iter().map(|&(a, b)| (path(a), path(b))).collect()
    }

    fn pair(a: &str, b: &str) -> (String, String) {
        (a.into(), b.into())
    }

    #[test]
    fn backward_before_forward_before_standalone() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(norm("n0"), &[x]);
        let b = net.add(conv("c0", 1), &[a]);
        let c = net.add(module("id", "nn.Identity"), &[b]);
        let d = net.add(norm("n1"), &[c]);
        let e = net.add(conv("c1", 1), &[d]);
        let f = net.add(module("r", "nn.ReLU"), &[e]);
        let g = net.add(norm("n2"), &[f]);
        let graph = net.finish(g);
        let none = HashSet::new();
        let folds = find(&graph, &none, &none);
        assert_eq!(named(&graph, &folds.backward), [pair("c0", "n1")]);
        assert_eq!(named(&graph, &folds.forward), [pair("n0", "c0")]);
        assert_eq!(folds.standalone, [graph.module("n2").unwrap()]);

        let folds = find(&graph, &none, &ids(&graph, &["c0"]));
        assert!(folds.forward.is_empty());
        let folds = find(&graph, &ids(&graph, &["c0", "n2"]), &none);
        // n1 is free for the layer behind it once c0 is not to be touched.
        assert_eq!(named(&graph, &folds.forward), [pair("n1", "c1")]);
        assert_eq!(folds.standalone, [graph.module("n0").unwrap()]);
    }

    #[test]
    fn what_others_see_is_not_folded() {
        // The tensor between them is used elsewhere.
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.add(norm("n"), &[a]);
        let c = net.function("add", &[a, b]);
        let graph = net.finish(c);
        let none = HashSet::new();
        assert!(find(&graph, &none, &none).backward.is_empty());

        // It is an output of the model.
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.add(norm("n"), &[a]);
        net.0.output(a, 1).unwrap();
        let graph = net.finish(b);
        assert!(find(&graph, &none, &none).backward.is_empty());

        // The layer, or the normalization, runs twice.
        for (again, with) in [("c", "n2"), ("n", "c2")] {
            let mut net = Net::new();
            let x = net.input();
            let a = net.add(conv("c", 1), &[x]);
            let b = net.add(norm("n"), &[a]);
            let c = if again == "c" {
                let c = net.call("c", &[b]);
                net.add(norm(with), &[c])
            } else {
                let c = net.add(conv(with, 1), &[b]);
                net.call("n", &[c])
            };
            let graph = net.finish(c);
            let folds = find(&graph, &none, &none);
            assert!(
                folds.backward.is_empty() && folds.forward.is_empty(),
                "{again}"
            );
        }
    }

    #[test]
    fn transposed_between() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c", 1), &[x]);
        let b = net.function("t", &[a]);
        let c = net.add(norm("n"), &[b]);
        let graph = net.finish(c);
        let none = HashSet::new();
        assert!(find(&graph, &none, &none).backward.is_empty());
    }

    #[test]
    fn neighbours_on_either_side() {
        let mut net = Net::new();
        let x = net.input();
        let a = net.add(conv("c0", 1), &[x]);
        let b = net.add(norm("n0"), &[a]);
        let c = net.add(module("r", "nn.ReLU6"), &[b]);
        let d = net.add(conv("c1", 1), &[c]);
        let e = net.function("add", &[c, d]);
        let f = net.add(conv("c2", 1), &[e]);
        let graph = net.finish(f);
        let id = |path: &str| graph.module(path).unwrap();
        let n0 = Some((id("n0"), Follower::Relu6));
        let expected = [(id("c0"), None, n0), (id("c1"), n0, None)];
        let expected = expected.map(|(layer, input, output)| Neighbours {
            layer,
            input,
            output,
        });
        assert_eq!(neighbours(&graph), expected);
    }
}
