(** The oracle: overwriting a state with the tuned one

    The oracle steer at the output of block l, computed in the steered run, is
    (tuned state) - (state the steered run produced there), so adding it overwrites.

    Claims, for any blocks V -> V on any additive group V:
      - Sequential oracle: overwriting at every block reproduces the tuned run, state
        by state.
      - More generally, if steered and tuned blocks agree at the tuned states, the
        two runs agree.
      - One oracle, at block l only: the result is the base model run on from the
        tuned state after block l.  Hence it is the tuned model when the blocks after
        l are not updated, and always when l is the last block.

    Assumptions.  None: no size, no smoothness, no linearity.

    Not said here.  A final norm or head that was updated comes after the last block
    and is not covered.  Offsets recorded in the unsteered base run and added at all
    blocks at once are another thing, and count blocks many times: over_count.v. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics error_control.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Oracle.
Variable V : zmodType.
Implicit Types (base tuned steered : nat -> V -> V) (x : V).

(** Base block l followed by the oracle steer: add (target_l - own output). *)
Definition overwritten base (target : nat -> V) l (h : V) : V :=
  base l h + (target l - base l h).

(** Steered and tuned blocks that agree at the tuned states give equal runs. *)
Theorem oracle_exact tuned steered x n :
    (forall l, steered l (run tuned l x) = tuned l (run tuned l x)) ->
  run steered n x = run tuned n x.
Proof. by move=> E; elim: n => //= n ->. Qed.

(** Sequential oracle: overwriting at every block gives the tuned run. *)
Theorem sequential_oracle base tuned x n :
  run (overwritten base (fun l => run tuned l.+1 x)) n x = run tuned n x.
Proof. by apply: oracle_exact => l; rewrite /overwritten addrC subrK. Qed.

(** Blocks of f up to and including l, blocks of g after it. *)
Definition hybrid (f g : nat -> V -> V) l k : V -> V := if (k <= l)%N then f k else g k.

(** Up to block l the hybrid is the tuned model. *)
Lemma hybrid_prefix f g l n x : (n <= l.+1)%N -> run (hybrid f g l) n x = run f n x.
Proof.
by elim: n => //= n IHn nl; rewrite IHn 1?ltnW // /hybrid -ltnS nl.
Qed.

(** Base model with the oracle at block l alone. *)
Definition one_overwrite base tuned x l k : V -> V :=
  if k == l then overwritten base (fun k => run tuned k.+1 x) k else base k.

(** One oracle at block l: tuned blocks up to l, base blocks after. *)
Theorem one_oracle_is_hybrid base tuned x l n : (l < n)%N ->
  run (one_overwrite base tuned x l) n x = run (hybrid tuned base l) n x.
Proof.
elim: n => // n IHn; rewrite ltnS /= leq_eqVlt => /orP[/eqP<-|ln].
  rewrite {1}/one_overwrite eqxx /overwritten addrC subrK.
  by rewrite hybrid_prefix // /hybrid leqnn.
by rewrite {1}/one_overwrite (gtn_eqF ln) IHn // {2}/hybrid leqNgt ln.
Qed.

(** An oracle at block l is exact when no later block is updated. *)
Theorem one_oracle_exact base tuned x l n : (l < n)%N ->
    (forall k h, (l < k)%N -> base k h = tuned k h) ->
  run (one_overwrite base tuned x l) n x = run tuned n x.
Proof.
move=> ln same; rewrite one_oracle_is_hybrid //; elim: n {ln} => //= n ->.
by rewrite /hybrid; case: leqP => // /same.
Qed.
End Oracle.
