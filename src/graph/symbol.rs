//! Names from a small vocabulary: module classes, torch functions, operator types, parameters, dtypes.
//!
//! A graph of ten thousand nodes speaks of some dozens of them. Each is kept once per process and never freed (as
//! torch keeps its own operator names, `c10::Symbol`): comparing two reads no text, and what the tables of
//! [`op_types`](super::op_types) say of a name is looked up once.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::{LazyLock, PoisonError, RwLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::op_types::{self, Traits};

/// An interned name. Reads as a `str`.
#[derive(Clone, Copy)]
pub struct Symbol(&'static Entry);

struct Entry {
    text: Box<str>,
    index: usize,
    traits: Traits,
    /// `None`: this very name.
    module_op_type: Option<Symbol>,
}

type Vocabulary = RwLock<HashMap<&'static str, Symbol>>;
static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(Vocabulary::default);

impl Symbol {
    /// The symbol of `text`; the first call for a name takes it into the vocabulary.
    pub fn new(text: &str) -> Self {
        if let Some(symbol) = Self::get(text) {
            return symbol;
        }
        let op_type = op_types::module_op_type(text);
        let module_op_type = (op_type != text).then(|| Symbol::new(op_type));
        let mut known = VOCABULARY.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been faster.
        if let Some(symbol) = known.get(text) {
            return *symbol;
        }
        let entry: &'static Entry = Box::leak(Box::new(Entry {
            text: text.into(),
            index: known.len(),
            traits: Traits::of(text),
            module_op_type,
        }));
        known.insert(&entry.text, Symbol(entry));
        Symbol(entry)
    }

    /// The symbol of `text`, if there is one: no node, module or parameter has any other name.
    pub fn get(text: &str) -> Option<Self> {
        let known = VOCABULARY.read().unwrap_or_else(PoisonError::into_inner);
        known.get(text).copied()
    }

    pub fn as_str(self) -> &'static str {
        &self.0.text
    }

    /// What the operator tables say of this name.
    pub fn traits(self) -> &'static Traits {
        &self.0.traits
    }

    /// Operator type of the nodes of a module of this class, see [`op_types::module_op_type`].
    pub fn module_op_type(self) -> Symbol {
        self.0.module_op_type.unwrap_or(self)
    }
}

impl Deref for Symbol {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl From<&str> for Symbol {
    fn from(text: &str) -> Self {
        Symbol::new(text)
    }
}

impl PartialEq for Symbol {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}
impl Eq for Symbol {}

impl PartialEq<str> for Symbol {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}
impl PartialEq<&str> for Symbol {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl Hash for Symbol {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.index.hash(state);
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}
impl fmt::Debug for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// As its text.
impl Serialize for Symbol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}
impl<'de> Deserialize<'de> for Symbol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Symbol::new(&String::deserialize(deserializer)?))
    }
}

/// A value per symbol, found by its number in the vocabulary: in the loops over a graph, where hashing would cost
/// more than the rest.
#[derive(Debug)]
pub struct SymbolMap<T> {
    entries: Vec<Option<(Symbol, T)>>,
}

impl<T> Default for SymbolMap<T> {
    fn default() -> Self {
        SymbolMap {
            entries: Vec::new(),
        }
    }
}

impl<T> SymbolMap<T> {
    pub fn get(&self, symbol: Symbol) -> Option<&T> {
        let entry = self.entries.get(symbol.0.index)?.as_ref()?;
        Some(&entry.1)
    }

    pub fn get_or_insert_with(&mut self, symbol: Symbol, make: impl FnOnce() -> T) -> &mut T {
        let index = symbol.0.index;
        if index >= self.entries.len() {
            self.entries.resize_with(index + 1, || None);
        }
        &mut self.entries[index]
            .get_or_insert_with(|| (symbol, make()))
            .1
    }

    /// All (symbol, value), in the order of the vocabulary.
    pub fn iter(&self) -> impl Iterator<Item = &(Symbol, T)> {
        self.entries.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_symbol_per_name() {
        let threads: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(|| Symbol::new("test.one_symbol_per_name")))
            .collect();
        let symbols: Vec<Symbol> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(symbols.iter().all(|&symbol| symbol == symbols[0]));
        assert_ne!(symbols[0], Symbol::new("nn.ReLU"));
        assert_eq!(symbols[0], "test.one_symbol_per_name");
        assert!(Symbol::get("test.never_made").is_none());
    }

    #[test]
    fn reads_and_writes_as_text() {
        let text = serde_json::to_string(&Symbol::new("nn.Linear")).unwrap();
        assert_eq!(text, "\"nn.Linear\"");
        let back: Symbol = serde_json::from_str(&text).unwrap();
        assert_eq!(back, Symbol::new("nn.Linear"));
    }

    #[test]
    fn a_value_per_symbol() {
        let mut map = SymbolMap::default();
        let (a, b) = (Symbol::new("nn.Linear"), Symbol::new("nn.ReLU"));
        *map.get_or_insert_with(a, || 1) += 1;
        *map.get_or_insert_with(a, || 5) += 1;
        assert_eq!((map.get(a), map.get(b)), (Some(&3), None));
        assert_eq!(map.iter().collect::<Vec<_>>(), [&(a, 3)]);
    }
}
