// What the reader has chosen, in one place; whoever shows it is told what has changed.

export const createStore = (state) => {
  const listeners = [];
  return {
    state,
    set(patch) {
      const changed = Object.keys(patch).filter((key) => state[key] !== patch[key]);
      if (!changed.length) return;
      Object.assign(state, patch);
      for (const [keys, listen] of listeners) {
        if (keys.some((key) => changed.includes(key))) listen(state);
      }
    },
    on(keys, listen) {
      listeners.push([keys, listen]);
    },
  };
};
