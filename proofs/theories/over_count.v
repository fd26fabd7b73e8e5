(** Adding the propagated shift at every block counts early blocks many times

    Let δ_l be the first-order shift of state l in the tuned model (superposition.v,
    δ_0 = 0), and e_l the local shift of block l.  Suppose offsets are recorded in the
    base run and added at the outputs of all blocks at once.

    Claims, to first order:
      - local offsets e_l give δ_L: every update is counted once;
      - propagated offsets δ_(l+1) give  sum_(l < L) (L - l) J_(L<-l+1) e_l ,
        so block l is counted L - l times;
      - the excess over δ_L is  sum_(l < L) (L - l - 1) J_(L<-l+1) e_l : zero for the
        last block's update only.
    And an exact example: two blocks h -> h tuned to h -> h + a; offsets a and 2 a give
    h + 3 a instead of h + 2 a.

    Assumptions.  As in superposition.v.

    Not said here.  How bad the excess is for the loss depends on the size of the
    update and on cancellation between blocks. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics error_control superposition.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section OverCount.
Variable V : zmodType.
Variables (J : nat -> {additive V -> V}) (e : nat -> V).

(** First-order shift of the run with propagated offsets at every block: the offset
    at the output of block l is δ_(l+1). *)
Definition with_propagated_offsets : nat -> V :=
  propagated J 0 (fun l => propagated J 0 e l.+1).

(** It counts block l exactly L - l times. *)
Theorem over_count L :
  with_propagated_offsets L = \sum_(l < L) carry J l.+1 L (e l) *+ (L - l).
Proof.
elim: L => [|L IHL]; first by rewrite big_ord0.
rewrite /with_propagated_offsets -[LHS]/(J L (with_propagated_offsets L) + _) IHL.
rewrite superposition carry0 add0r big_ord_recr [in RHS]big_ord_recr /= ltnn.
rewrite subSnn addrA raddf_sum -big_split /=; congr (_ + _).
by apply: eq_bigr => l _; rewrite ltn_ord raddfMn /= subSn ?mulrSr // ltnW.
Qed.

(** The excess over the tuned model's shift. *)
Theorem over_count_excess L :
  with_propagated_offsets L - propagated J 0 e L
    = \sum_(l < L) carry J l.+1 L (e l) *+ (L - l.+1).
Proof.
rewrite over_count superposition carry0 add0r -sumrB; apply: eq_bigr => l _.
by rewrite -(subnSK (ltn_ord l)) mulrS addrC addKr.
Qed.
End OverCount.

(** Two blocks h -> h, tuned to h -> h + a.  Offsets of the base run are a and 2 a;
    added together they give h + 3 a, the tuned model gives h + 2 a. *)
Theorem over_count_example (V : zmodType) (h a : V) :
  let base := fun (_ : nat) (x : V) => x in
  let tuned := fun (_ : nat) (x : V) => x + a in
  let offset := fun l => run tuned l.+1 h - run base l.+1 h in
  run (fun l x => base l x + offset l) 2 h = h + a *+ 3 /\ run tuned 2 h = h + a *+ 2.
Proof.
have back v : h + v - h = v by rewrite addrC addKr.
by split; rewrite /= -?[h + a + a]addrA ?back -?addrA.
Qed.
