(** Superposition: the shift after L blocks is the sum of the local shifts, each
    carried to the end by the blocks that follow it

    Block l maps h_l to h_(l+1).  To first order an update shifts the state by

      δ_(l+1) = J_l δ_l + e_l,

    J_l the derivative of base block l in its input, e_l the local shift of block l
    (its own update, input held fixed), δ_0 the shift of the embedding.

    Claim.  δ_L = J_(L<-0) δ_0 + sum_(l < L) J_(L<-l+1) e_l,
            J_(n<-l) = J_(n-1) … J_l.

    Assumptions.  Only that every J_l is additive.  V is any additive group: one
    token, or all tokens of a batch together, as attention requires.

    Not said here.  That the true shift has this recursion for its first order is the
    chain rule, proved in superposition_derivative.v; how far the true shift is from
    it, in network_remainder.v. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Superposition.
Variable V : zmodType.
Implicit Types (J : nat -> {additive V -> V}) (e : nat -> V).

(** J_(n<-l): carry a shift of state l to state n (the identity for n <= l). *)
Fixpoint carry J l n (v : V) : V :=
  if n is k.+1 then (if (l <= k)%N then J k (carry J l k v) else v) else v.

(** δ_n by the recursion δ_(l+1) = J_l δ_l + e_l from δ_0 = v0. *)
Fixpoint propagated J v0 e n : V :=
  if n is k.+1 then J k (propagated J v0 e k) + e k else v0.

(** J_(l<-l) = 1 *)
Lemma carry_id J l v : carry J l l v = v.
Proof. by case: l => //= l; rewrite ltnn. Qed.

(** J_(n+1<-l) = J_n J_(n<-l) for l <= n. *)
Lemma carryS J l n v : (l <= n)%N -> carry J l n.+1 v = J n (carry J l n v).
Proof. by move=> /= ->. Qed.

(** J_(n<-l) 0 = 0 *)
Lemma carry0 J l n : carry J l n 0 = 0.
Proof. by elim: n => //= n ->; rewrite raddf0 if_same. Qed.

(** J_(n<-l) (v + w) = J_(n<-l) v + J_(n<-l) w *)
Lemma carryD J l n v w : carry J l n (v + w) = carry J l n v + carry J l n w.
Proof. by elim: n => //= n ->; rewrite raddfD; case: ifP. Qed.

(** δ_n = J_(n<-0) δ_0 + sum_(l < n) J_(n<-l+1) e_l *)
Theorem superposition J v0 e n :
  propagated J v0 e n = carry J 0 n v0 + \sum_(l < n) carry J l.+1 n (e l).
Proof.
elim: n => [|n IHn] /=; first by rewrite big_ord0 addr0.
rewrite IHn raddfD raddf_sum big_ord_recr ltnn addrA; congr (_ + _ + _).
by apply: eq_bigr => l _; rewrite /= ltn_ord.
Qed.
End Superposition.
